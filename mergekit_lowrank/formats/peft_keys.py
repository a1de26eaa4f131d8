"""The names of the tensors in a PEFT LoRA: how they are written, and what each foreign name means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from mergekit_lowrank.errors import CheckpointError, raise_together
from mergekit_lowrank.formats.tensors import TensorSpec

__all__ = ["FactorPair", "Findings", "pair_factors", "tensor_names"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor_names(module: str) -> tuple[str, str]:
    """The names under which PEFT stores a module's ``lora_A`` and ``lora_B``."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


class FactorPair(NamedTuple):
    """The headers of one module's factors: ``a`` (r, d_in) and ``b`` (d_out, r)."""

    a: TensorSpec
    b: TensorSpec


class _Kind(NamedTuple):
    """A kind of problem: what the offenders are, and what to do about them."""

    what: str
    advice: str


class Findings:
    """Problems of one adapter, gathered by kind: a thousand tensors with one fault make one message.

    Args:
        where: what messages call the adapter.
    """

    _examples_shown = 3

    def __init__(self, where: str) -> None:
        self._where = where
        self._examples: dict[_Kind, list[str]] = {}

    def add(self, what: str, example: str, advice: str) -> None:
        """Note one offender."""
        self._examples.setdefault(_Kind(what, advice), []).append(example)

    def raise_all(self) -> None:
        """Raise one ``CheckpointError`` for all of them; do nothing when there are none."""
        raise_together([CheckpointError(message) for message in self._messages()])

    def _messages(self) -> Iterator[str]:
        for kind, examples in self._examples.items():
            more = len(examples) - self._examples_shown
            listing = ", ".join(examples[: self._examples_shown]) + (f" and {more} more" if more > 0 else "")
            yield f"{self._where}: {kind.what}: {listing}. {kind.advice}"


_SAVE = "Save the adapter with PeftModel.save_pretrained"

_FOREIGN: tuple[tuple[re.Pattern[str], _Kind], ...] = (
    (
        re.compile(r"lora_magnitude_vector"),
        _Kind(
            "DoRA magnitudes, which are not handled",
            "Fold the adapter into its base model and extract a plain LoRA from the difference.",
        ),
    ),
    (
        re.compile(r"\.lora_embedding_[AB]\b"),
        _Kind("LoRA factors of embeddings, which are not handled", "Train without the embeddings in target_modules."),
    ),
    (
        re.compile(r"\.lora_[AB]\.(.+\.)?bias$"),
        _Kind("biases of LoRA factors, which are not handled", "Train with lora_bias=False."),
    ),
    (
        re.compile(r"\.lora_[AB]\.[^.]+\.weight$"),
        _Kind(
            "keys with the name of an adapter left in",
            f"{_SAVE}, or take its tensors from get_peft_model_state_dict: keys end in '.lora_A.weight'.",
        ),
    ),
    (
        re.compile(r"\.lora_[AB]\.weight$"),
        _Kind(
            f"keys without the prefix '{_PREFIX}'",
            f"{_SAVE}, or rename them: servers load such an adapter without an error and without an effect.",
        ),
    ),
    (
        re.compile(r"\.(modules_to_save|original_module)\."),
        _Kind(
            "whole tensors of modules_to_save, which a merge of factors would drop", "Train without modules_to_save."
        ),
    ),
    (
        re.compile(r"^(?!.*(lora|hada|lokr)_).*\b(weight|bias)$"),
        _Kind("whole tensors, which a merge of factors would drop", f"{_SAVE}, which stores the trained factors only."),
    ),
)

_UNKNOWN = _Kind(
    "tensors that nothing here handles", "Expected keys such as 'base_model.model.<module>.lora_A.weight'."
)


def pair_factors(specs: Mapping[str, TensorSpec], *, where: str) -> dict[str, FactorPair]:
    """The headers of both factors by module, in the order of ``specs``.

    Raises:
        CheckpointError: a name that is no factor's, half a pair, or factors that do not fit together, all in one.
    """
    findings = Findings(where)
    modules = list(dict.fromkeys(_modules(specs, findings)))
    pairs = {module: pair for module in modules if (pair := _pair(module, specs, findings)) is not None}
    for module, pair in pairs.items():
        _check_pair(module, pair, findings)
    findings.raise_all()
    if not pairs:
        raise CheckpointError(f"{where}: the adapter is empty; expected keys such as '{tensor_names('<module>')[0]}'.")
    return pairs


def _modules(keys: Iterable[str], findings: Findings) -> Iterator[str]:
    """The module of each factor; other keys become findings."""
    for key in keys:
        factor = _FACTOR.fullmatch(key)
        if factor:
            yield factor["module"]
        else:
            kind = next((kind for pattern, kind in _FOREIGN if pattern.search(key)), _UNKNOWN)
            findings.add(kind.what, f"'{key}'", kind.advice)


def _pair(module: str, specs: Mapping[str, TensorSpec], findings: Findings) -> FactorPair | None:
    key_a, key_b = tensor_names(module)
    if key_a in specs and key_b in specs:
        return FactorPair(specs[key_a], specs[key_b])
    lonely, missing = (key_a, "lora_B") if key_a in specs else (key_b, "lora_A")
    findings.add(f"factors without their {missing}", f"'{lonely}'", f"The file is incomplete: {_SAVE} again.")
    return None


def _check_pair(module: str, pair: FactorPair, findings: Findings) -> None:
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        findings.add(
            "factors that are not matrices (of convolutions, or fused), which are not handled",
            f"'{module}' (lora_A {list(pair.a.shape)}, lora_B {list(pair.b.shape)})",
            "Expected lora_A [r, in] and lora_B [out, r]: train linear modules only.",
        )
    elif pair.a.shape[0] != pair.b.shape[1]:
        findings.add(
            "factors whose ranks differ",
            f"'{module}' (lora_A {list(pair.a.shape)}, lora_B {list(pair.b.shape)})",
            "Expected lora_A [r, in] and lora_B [out, r] with one r: the tensors were mixed up.",
        )
    elif 0 in (*pair.a.shape, *pair.b.shape):
        findings.add(
            "factors without entries",
            f"'{module}' (lora_A {list(pair.a.shape)}, lora_B {list(pair.b.shape)})",
            "Remove the module from the adapter, or save it with rank 1 or more.",
        )
    for key, spec in zip(tensor_names(module), pair, strict=True):
        if spec.dtype not in _FACTOR_DTYPES:
            findings.add(
                "factors of a type that is not handled",
                f"'{key}' ({str(spec.dtype).removeprefix('torch.')})",
                "Expected float32, float16, bfloat16 or float64: save the adapter in one of them.",
            )
