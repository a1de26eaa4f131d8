"""llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mergekit_lowrank.servers.base import FOLD, Server, Verdict, misapplied, verdict
from mergekit_lowrank.servers.contents import Contents

__all__ = ["LlamaCpp"]

_COPIES = (
    "If no tokens were added, save it again: save_pretrained(…, save_embedding_layers=False). "
    f"If some were: {FOLD[0].lower()}{FOLD[1:]}"
)


class LlamaCpp(Server):
    """``llama-server --lora``.

    Adapters in PEFT's layout go through a converter first: its own, ``convert_lora_to_gguf.py``, whose mistakes are
    listed here, or the ``gguf`` writer, which makes none of them.

    Source: ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp`` and ``llama-adapter.h``, November 2026; gguf 0.19.
    """

    name: ClassVar[str] = "llama.cpp"
    version: ClassVar[str] = "llama.cpp of November 2026, gguf 0.19.0"
    format: ClassVar[str] = "gguf"
    reads: ClassVar[tuple[str, ...]] = ("gguf",)

    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        if contents.is_dora:
            yield Verdict(True, "llama.cpp has no DoRA, and its converter exits", FOLD)
        if contents.dialect == "peft" and not contents.variant:
            alpha = float(str(contents.config.get("lora_alpha") or 0))
            advice = self._conversion(contents)
            how = "llama.cpp's own converter keeps one lora_alpha, divided by the rank of each tensor"
            yield from misapplied(contents, lambda header: alpha / header.rank if alpha else 1.0, how, advice)
        yield from verdict(contents.convolutions, "llama.cpp has no factors of convolutions", FOLD)
        yield from verdict(contents.experts, "llama.cpp does not load PEFT's factors of fused experts", FOLD)
        tied = [
            name for name in contents.modules if name.rsplit(".", 1)[-1] == "lm_head" or name in contents.embeddings
        ]
        what = "factors of an embedding or output layer load only where the base does not tie the two"
        yield from verdict(tied, what, f"If it does: {FOLD[0].lower()}{FOLD[1:]}", is_fatal=False)
        yield from verdict(contents.biases, "llama.cpp has no lora_bias, and its converter exits", FOLD)
        beside = (*contents.saved, *contents.whole, *contents.base_biases)
        yield from verdict(beside, "llama.cpp loads no whole tensors (modules_to_save, norms, biases)", FOLD)
        what = (
            "llama.cpp's own converter leaves out weights of the base that lie beside their factors; ours refuses them"
        )
        yield from verdict(contents.copies, what, _COPIES)
        yield from verdict(contents.rows, "llama.cpp has no trainable_token_indices, and its converter exits", FOLD)
        yield from verdict(contents.side, "llama.cpp does not read LLaVA's side file", FOLD)
