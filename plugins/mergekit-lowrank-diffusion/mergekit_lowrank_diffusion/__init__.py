"""LoRAs of diffusion models for mergekit-lowrank: kohya, LyCORIS and diffusers files in and out, and block weights."""

from __future__ import annotations

from mergekit_lowrank import Format, hookimpl
from mergekit_lowrank.formats import Writer
from mergekit_lowrank_diffusion.blocks import block_weights
from mergekit_lowrank_diffusion.reading import DiffusersFormat, KohyaFormat
from mergekit_lowrank_diffusion.writing import DiffusersWriter, KohyaWriter

__all__ = ["DiffusersFormat", "DiffusersWriter", "KohyaFormat", "KohyaWriter", "block_weights", "formats", "writers"]


@hookimpl
def formats() -> list[type[Format]]:
    """Of kohya's tools and of diffusers."""
    return [DiffusersFormat, KohyaFormat]


@hookimpl
def writers() -> list[type[Writer]]:
    """Of kohya's tools and of diffusers."""
    return [KohyaWriter, DiffusersWriter]
