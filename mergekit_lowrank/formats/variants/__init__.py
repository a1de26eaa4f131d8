"""PEFT's other adapter kinds, read as the LoRA that computes the same."""

from collections.abc import Callable, Mapping

from mergekit_lowrank.formats.base import Checkpoint
from mergekit_lowrank.formats.variants.adalora import AdaloraCheckpoint
from mergekit_lowrank.formats.variants.checkpoint import VariantCheckpoint
from mergekit_lowrank.formats.variants.loha import LohaCheckpoint
from mergekit_lowrank.formats.variants.lokr import LokrCheckpoint
from mergekit_lowrank.formats.variants.unsupported import UNSUPPORTED
from mergekit_lowrank.formats.variants.vera import VeraCheckpoint

__all__ = ["UNSUPPORTED", "VARIANTS", "VariantCheckpoint"]

VARIANTS: Mapping[str, Callable[..., Checkpoint]] = {
    "ADALORA": AdaloraCheckpoint.open,
    "LOHA": LohaCheckpoint.open,
    "LOKR": LokrCheckpoint.open,
    "VERA": VeraCheckpoint.open,
}
"""Opens a configuration as stored and its tensors, by ``peft_type``."""
