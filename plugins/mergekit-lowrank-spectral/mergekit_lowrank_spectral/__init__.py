"""Spectral merge methods for mergekit-lowrank: TSV-M, Iso-C, Iso-CTS, CART, STAR and LoRA-LEGO, from factors only."""

from __future__ import annotations

from mergekit_lowrank import Strategy, hookimpl
from mergekit_lowrank_spectral.cart import Cart
from mergekit_lowrank_spectral.iso import IsoC, IsoCts
from mergekit_lowrank_spectral.lora_lego import LoraLego
from mergekit_lowrank_spectral.star import Star
from mergekit_lowrank_spectral.tsv import Tsv

__all__ = ["Cart", "IsoC", "IsoCts", "LoraLego", "Star", "Tsv", "strategies"]


@hookimpl
def strategies() -> list[type[Strategy]]:
    """Every method of this package."""
    return [Tsv, IsoC, IsoCts, Cart, Star, LoraLego]
