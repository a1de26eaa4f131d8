"""ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mergekit_lowrank.servers.base import FOLD, Server, Verdict, misapplied, verdict
from mergekit_lowrank.servers.contents import Contents

__all__ = ["ComfyUI"]


class ComfyUI(Server):
    """The node Load LoRA.

    A key that fits nothing is logged ("lora key not loaded") and left out. The scaling is ``.alpha`` over the rank of
    each module, or 1 without it: what a file's header or ``adapter_config.json`` says is not read.

    Source: ComfyUI 0.38.1: ``comfy/lora.py``, ``comfy/weight_adapter/lora.py``.
    """

    name: ClassVar[str] = "comfyui"
    version: ClassVar[str] = "ComfyUI 0.38.1"
    format: ClassVar[str] = "kohya"
    reads: ClassVar[tuple[str, ...]] = ("kohya", "diffusers")
    is_for_diffusion: ClassVar[bool] = True

    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        if contents.dialect == "diffusers" and not contents.has_alphas:
            how = "ComfyUI does not read alpha from the file's header"
            yield from misapplied(contents, lambda _: 1.0, how, self._conversion(contents))
        if contents.dialect == "diffusers":
            if contents.is_dora:
                yield Verdict(True, "ComfyUI leaves 'lora_magnitude_vector' out, so DoRA acts as a LoRA", FOLD)
            yield from verdict(contents.biases, "ComfyUI leaves biases of lora_B out", FOLD)
        beside = (
            *contents.saved,
            *contents.whole,
            *contents.copies,
            *contents.base_biases,
            *contents.rows,
            *contents.side,
        )
        yield from verdict(beside, "ComfyUI leaves whole tensors of PEFT out", FOLD)
        yield from verdict(contents.experts, "ComfyUI leaves factors of fused experts out", FOLD)
