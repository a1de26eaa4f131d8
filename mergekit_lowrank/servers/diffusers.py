"""diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mergekit_lowrank.servers.base import FOLD, Server, Verdict, verdict
from mergekit_lowrank.servers.contents import Contents

__all__ = ["Diffusers"]


class Diffusers(Server):
    """``pipeline.load_lora_weights``.

    It takes keys that start with the name of a part of the pipeline, such as ``unet.``, and warns where there are none,
    as in PEFT's directories. Ranks and scaling are read for each module.

    Source: diffusers 0.42.1: ``loaders/lora_pipeline.py``, ``loaders/peft.py``, ``utils/peft_utils.py``.
    """

    name: ClassVar[str] = "diffusers"
    version: ClassVar[str] = "diffusers 0.42.1"
    format: ClassVar[str] = "diffusers"
    reads: ClassVar[tuple[str, ...]] = ("diffusers", "kohya")
    is_for_diffusion: ClassVar[bool] = True

    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        if contents.is_dora and contents.dialect == "kohya":
            yield Verdict(True, "diffusers filters 'dora_scale' out, with a warning only", FOLD)
        beside = (
            *contents.saved,
            *contents.whole,
            *contents.copies,
            *contents.base_biases,
            *contents.rows,
            *contents.side,
        )
        yield from verdict(beside, "diffusers loads no whole tensors in a LoRA", FOLD)
        yield from verdict(contents.experts, "diffusers loads no factors of fused experts", FOLD)
