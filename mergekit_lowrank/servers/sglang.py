"""SGLang."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

from mergekit_lowrank.servers.base import FOLD, KEEP, Server, Verdict, anew, converted, misapplied, verdict
from mergekit_lowrank.servers.contents import Contents

__all__ = ["SGLang"]

_LAYER = re.compile(r"layers\.\d+\.")
_OUTSIDE = ("embed_tokens", "lm_head")
_SHORTHANDS = ("all", "all-linear")


class SGLang(Server):
    """``sglang.launch_server --enable-lora``.

    Source: SGLang 0.5.23, ``srt/lora``: ``lora_config.py``, ``lora.py``, ``lora_manager.py``, ``mem_pool.py``.
    """

    name: ClassVar[str] = "sglang"
    version: ClassVar[str] = "SGLang 0.5.23"
    format: ClassVar[str] = "peft"
    reads: ClassVar[tuple[str, ...]] = ("peft",)

    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        if contents.is_dora:
            yield Verdict(True, "SGLang refuses DoRA", FOLD)
        if contents.variant:
            what = f"SGLang loads peft_type LORA only; this is {contents.variant}"
            yield Verdict(True, what, converted(contents, self.format))
        elif contents.dialect == "peft":
            yield from _judge_scaling(contents)
        yield from _judge_targets(contents)
        yield from _judge_projections(contents)
        yield from _judge_kinds(contents)


def _judge_scaling(contents: Contents) -> Iterator[Verdict]:
    """It takes r for the rank of every tensor, and lora_alpha / r for every scaling."""
    rank, alpha = (float(str(contents.config.get(name) or 1)) for name in ("r", "lora_alpha"))
    other = [header.name for header in contents.factored if header.rank != rank]
    what = f"SGLang takes r ({rank:g}) for the rank of every module and fails at others"
    yield from verdict(other, what, anew(contents))
    how = "SGLang computes lora_alpha / r, without rsLoRA and patterns"
    yield from misapplied(contents, lambda _: alpha / rank, how, anew(contents))


def _judge_targets(contents: Contents) -> Iterator[Verdict]:
    """What it reads of ``target_modules``, and which modules it looks at."""
    targets = contents.config.get("target_modules")
    if contents.dialect == "peft" and (targets is None or (isinstance(targets, str) and targets not in _SHORTHANDS)):
        what = f"SGLang reads no target_modules like {targets!r}, only a list or all-linear"
        yield Verdict(True, what, anew(contents))
    named = {str(target).rsplit(".", 1)[-1] for target in targets} if isinstance(targets, list) else {*_OUTSIDE}
    dropped = [name for name in contents.modules if not _LAYER.search(name) and name.rsplit(".", 1)[-1] not in _OUTSIDE]
    yield from verdict(dropped, "SGLang leaves out modules outside of the layers without a word", FOLD)
    unnamed = [
        name
        for name in contents.modules
        if (own := name.rsplit(".", 1)[-1]) in _OUTSIDE and not _LAYER.search(name) and own not in named
    ]
    what = "SGLang leaves out embeddings and output layers that target_modules does not name"
    yield from verdict(unnamed, what, anew(contents))


def _judge_projections(contents: Contents) -> Iterator[Verdict]:
    """It fuses q, k and v, and gate and up, starting from q and gate."""
    beside = defaultdict(set)
    for module in contents.modules:
        parent, _, name = module.rpartition(".")
        beside[parent].add(name)
    alone = [f"{parent}.q_proj" for parent, names in beside.items() if "q_proj" in names and "v_proj" not in names]
    yield from verdict(alone, "SGLang fails at q_proj without v_proj", _WIDEN)
    led = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    dropped = [
        f"{parent}.{name}"
        for parent, names in beside.items()
        for name, leader in led.items()
        if name in names and leader not in names
    ]
    what = "SGLang leaves out k_proj and v_proj without q_proj, and up_proj without gate_proj, with a warning only"
    yield from verdict(dropped, what, _WIDEN)


_WIDEN = f"Train with the modules beside it too. {FOLD}"


def _judge_kinds(contents: Contents) -> Iterator[Verdict]:
    yield from verdict(contents.convolutions, "SGLang has no factors of convolutions", FOLD)
    yield from verdict(contents.experts, "SGLang does not read PEFT's factors of fused experts", FOLD)
    biases = (*contents.biases, *contents.base_biases)
    yield from verdict(biases, "SGLang has no lora_bias and bias, and fails where it takes them for factors", FOLD)
    beside = (*contents.saved, *contents.whole)
    yield from verdict(beside, "SGLang leaves out whole tensors (modules_to_save)", FOLD)
    what = "SGLang leaves the base's weights out that lie beside their factors"
    yield from verdict(contents.copies, what, KEEP, is_fatal=False)
    yield from verdict(contents.rows, "SGLang leaves out trainable_token_indices", FOLD)
    yield from verdict(contents.side, "SGLang does not read LLaVA's side file", FOLD)
