"""vLLM."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import ClassVar

from mergekit_lowrank.policies import VLLM_RANKS, snapped
from mergekit_lowrank.servers.base import FOLD, KEEP, Server, Verdict, anew, converted, misapplied, verdict
from mergekit_lowrank.servers.contents import Contents

__all__ = ["VLLM"]

_DEFAULT_RANK = 16
_HEADS = ("classifier", "score")
_WRAPPERS = re.compile(r"(^|\.)(base_model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")


class VLLM(Server):
    """``vllm serve --enable-lora``.

    Source: vLLM 0.33.0: ``config/lora.py``; ``lora/peft_helper.py``, ``lora/lora_model.py``, ``lora/utils.py``.
    """

    name: ClassVar[str] = "vllm"
    version: ClassVar[str] = "vLLM 0.33.0"
    format: ClassVar[str] = "peft"
    reads: ClassVar[tuple[str, ...]] = ("peft",)
    accepted_ranks: ClassVar[tuple[int, ...]] = VLLM_RANKS

    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        if contents.is_dora:
            yield Verdict(True, "vLLM refuses DoRA", FOLD)
        if contents.variant:
            what = f"vLLM reads lora_A and lora_B only; this is of type {contents.variant}"
            yield Verdict(True, what, converted(contents, self.format))
        yield from _judge_ranks(contents)
        yield from _judge_patterns(contents)
        yield from _judge_files(contents)
        yield from _judge_modules(contents)
        yield from _judge_beside(contents)


def _judge_ranks(contents: Contents) -> Iterator[Verdict]:
    largest = contents.ranks[-1] if contents.ranks else 1
    started = snapped(largest, VLLM_RANKS)
    if started is None:
        limit = VLLM_RANKS[-1]
        made = f"{contents.source} {contents.named(str(limit))} --rank {limit}"
        advice = f"Cut it: mergekit-lowrank resize {made}."
        yield Verdict(True, f"vLLM loads no rank above {limit}; the largest is {largest}", advice)
    elif started > _DEFAULT_RANK:
        what = f"rank {largest} needs more than vLLM's default of {_DEFAULT_RANK}"
        yield Verdict(False, what, f"Start it with --max-lora-rank {started}.")


def _judge_patterns(contents: Contents) -> Iterator[Verdict]:
    """0.33.0 reads the patterns; releases that do not compute one scaling."""
    if not (contents.config.get("rank_pattern") or contents.config.get("alpha_pattern")):
        return
    scaling = _global_scaling(contents)
    how = "vLLM 0.33.0 reads rank_pattern and alpha_pattern; older releases take one scaling for all modules"
    yield from misapplied(contents, lambda _: scaling, how, anew(contents), is_fatal=False)


def _global_scaling(contents: Contents) -> float:
    alpha, rank = (float(str(contents.config.get(name) or 1)) for name in ("lora_alpha", "r"))
    return alpha / (math.sqrt(rank) if contents.config.get("use_rslora") else rank)


def _judge_files(contents: Contents) -> Iterator[Verdict]:
    what = "vLLM opens adapter_model.safetensors or .bin only, no shards"
    yield from verdict(contents.shards, what, converted(contents, "peft"))
    if contents.is_nested:
        what = "vLLM looks for adapter_config.json in the directory it is given, and this one lies below it"
        yield Verdict(True, what, "Give the sub-directory.")


def _judge_modules(contents: Contents) -> Iterator[Verdict]:
    wrapped = [module for module in contents.modules if _WRAPPERS.search(module)]
    what = "names with a wrapper of training left in fit no module, and vLLM serves the base without an error"
    yield from verdict(wrapped, what, "Save the adapter from the unwrapped model.")
    yield from verdict(contents.convolutions, "vLLM refuses factors of convolutions", FOLD)
    what = "factors of an embedding load only where the model's class names its embeddings and the vocabulary is whole"
    yield from verdict(contents.embeddings, what, f"If it refuses them: {_lowered(FOLD)}", is_fatal=False)
    what = "factors of fused experts load only where vLLM keeps the experts of the model in one tensor"
    yield from verdict(contents.experts, what, f"If it refuses them: {_lowered(FOLD)}", is_fatal=False)


def _judge_beside(contents: Contents) -> Iterator[Verdict]:
    yield from verdict(contents.biases, "vLLM refuses lora_bias", FOLD)
    yield from verdict(contents.base_biases, "vLLM refuses trained biases", FOLD)
    saved = [extra.name for extra in contents.extras if extra.saved_under and extra.saved_under not in _HEADS]
    yield from verdict(saved, f"vLLM refuses modules_to_save other than {' and '.join(_HEADS)}", FOLD)
    yield from verdict(contents.whole, "vLLM refuses whole tensors", FOLD)
    what = "vLLM leaves the base's weights out that lie beside their factors"
    yield from verdict(contents.copies, what, KEEP, is_fatal=False)
    yield from verdict(contents.rows, "vLLM refuses trainable_token_indices", FOLD)
    yield from verdict(contents.side, "vLLM does not read LLaVA's side file", FOLD)


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
