"""The names of the tensors in a PEFT LoRA: what each is, and what each foreign name means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mergekit_lowrank.errors import CheckpointError, raise_together
from mergekit_lowrank.formats.layouts import LINEAR, PREFIX, Convolution, Embedding, Expert, Factored
from mergekit_lowrank.formats.peft_config import PeftConfig
from mergekit_lowrank.formats.tensors import TensorSpec

__all__ = ["Contents", "Factors", "Findings", "contents_of", "tensor_names"]

_FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor_names(module: str) -> tuple[str, str]:
    """The names under which PEFT stores the ``lora_A`` and ``lora_B`` of a linear module."""
    return LINEAR.names(module)


@dataclass(frozen=True)
class Factors:
    """The stored factors of one module.

    Attributes:
        a: the name of the tensor with A.
        b: the name of the tensor with B.
        layout: how the update follows from them.
        shape: (d_out, d_in) of the update.
        rank: of the update.
    """

    a: str
    b: str
    layout: Factored
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class Contents:
    """What the tensors of an adapter are.

    Attributes:
        factors: by module.
        biases: the names of ``lora_B.bias`` by module.
        magnitudes: the names of DoRA's magnitudes by module.
        tokens: the names of trained rows by the module of the embedding.
        whole: the names of tensors that replace a parameter of the base, by its name.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


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

_KNOWN: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a", re.compile(r"(?P<module>.+)\.lora_A\.weight")),
    ("b", re.compile(r"(?P<module>.+)\.lora_B\.weight")),
    ("bias", re.compile(r"(?P<module>.+)\.lora_B\.bias")),
    ("embedding_a", re.compile(r"(?P<module>.+)\.lora_embedding_A")),
    ("embedding_b", re.compile(r"(?P<module>.+)\.lora_embedding_B")),
    ("magnitude", re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")),
    ("tokens", re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")),
    ("whole", re.compile(r"(?!.*(lora|hada|lokr|vera|ia3|original_module|trainable_tokens)).+\.[^.]+")),
)
"""What a tensor is by its name behind the prefix; the first that matches."""

_FOREIGN: tuple[tuple[re.Pattern[str], _Kind], ...] = (
    (
        re.compile(r"\.lora_[AB]\.[^.]+\.weight$|\.lora_embedding_[AB]\.[^.]+$"),
        _Kind(
            "keys with the name of an adapter left in",
            f"{_SAVE}, or take its tensors from get_peft_model_state_dict: keys end in '.lora_A.weight'.",
        ),
    ),
    (
        re.compile(r"\.lora_A\.(.+\.)?bias$"),
        _Kind("biases of lora_A, which peft never writes", f"{_SAVE}."),
    ),
    (
        re.compile(r"original_module\."),
        _Kind("copies of the base's tensors ('original_module')", f"{_SAVE}, which leaves them out."),
    ),
    (
        re.compile(rf"^(?!{re.escape(PREFIX)}|lora_)"),
        _Kind(
            f"keys without the prefix '{PREFIX}'",
            f"{_SAVE}, or rename them: servers load such an adapter without an error and without an effect.",
        ),
    ),
)

_ORIGINAL = ".original_module."

_UNKNOWN = _Kind(
    "tensors that nothing here handles", "Expected keys such as 'base_model.model.<module>.lora_A.weight'."
)


def contents_of(specs: Mapping[str, TensorSpec], config: PeftConfig, *, where: str) -> Contents:
    """What the tensors are, in the order of ``specs``.

    Raises:
        CheckpointError: a name that nothing handles, half a pair, or factors that do not fit together, all in one.
    """
    findings, found = Findings(where), Contents()
    keys: dict[str, dict[str, str]] = {}
    for key in specs:
        kind, module = _sorted(key)
        if _ORIGINAL in key and key.replace(_ORIGINAL, ".") in specs:
            continue  # peft writes them with bias="all"; nothing uses them
        if kind is None:
            foreign = next((kind for pattern, kind in _FOREIGN if pattern.search(key)), _UNKNOWN)
            findings.add(foreign.what, f"'{key}'", foreign.advice)
        elif kind == "whole" and module in found.whole:
            both = f"'{module}' ('{found.whole[module]}' and '{key}')"
            findings.add("parameters that are there twice", both, f"{_SAVE} again.")
        elif kind == "whole":
            if not _is_repeated(key, specs):
                found.whole[module] = key
        else:
            keys.setdefault(module, {})[kind] = key
    for module, own in keys.items():
        _add_factors(found, module, own, specs, config, findings)
    for group, name in ((found.biases, "bias"), (found.magnitudes, "magnitude"), (found.tokens, "tokens")):
        group.update({module: own[name] for module, own in keys.items() if name in own})
    findings.raise_all()
    if not (found.factors or found.tokens or found.whole):
        raise CheckpointError(f"{where}: the adapter is empty; expected keys such as '{tensor_names('<module>')[0]}'.")
    return found


def _is_repeated(key: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether peft stored a saved module's tensor under the name that it loads, too."""
    return ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in specs


def _sorted(key: str) -> tuple[str | None, str]:
    """What a tensor is, and the module (of whole tensors the parameter) that it belongs to."""
    if not key.startswith(PREFIX):
        return None, key
    name = key.removeprefix(PREFIX)
    for kind, pattern in _KNOWN:
        match = pattern.fullmatch(name)
        if match and kind == "whole":
            return kind, name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if match:
            return kind, match["module"]
    return None, key


def _add_factors(
    found: Contents,
    module: str,
    own: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    config: PeftConfig,
    findings: Findings,
) -> None:
    """The factors of a module, one for each expert where they are fused; problems become findings."""
    for a, b, label in (("a", "b", "lora_"), ("embedding_a", "embedding_b", "lora_embedding_")):
        if a in own and b in own:
            problem = _problem_of_pair(specs[own[a]], specs[own[b]])
            if problem is None:
                found.factors.update(_factors(module, own[a], own[b], specs, config, findings))
            else:
                shapes = f"'{module}' ({label}A {list(specs[own[a]].shape)}, {label}B {list(specs[own[b]].shape)})"
                findings.add(problem.what, shapes, problem.advice)
            _check_types((own[a], own[b]), specs, findings)
        elif a in own or b in own:
            lonely, missing = (own[a], f"{label}B") if a in own else (own[b], f"{label}A")
            findings.add(f"factors without their {missing}", f"'{lonely}'", f"The file is incomplete: {_SAVE} again.")
    stray = [own[kind] for kind in ("bias", "magnitude") if kind in own]
    _check_types(stray, specs, findings)
    if stray and not {"a", "embedding_a"} & own.keys():
        findings.add("tensors of factors that are missing", f"'{stray[0]}'", f"The file is incomplete: {_SAVE} again.")
    elif "bias" in own:
        _check_bias(own["bias"], found.factors.get(module), specs, findings)


def _problem_of_pair(a: TensorSpec, b: TensorSpec) -> _Kind | None:
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or any(size != 1 for size in b.shape[2:]):
        return _Kind(
            "factors that are no matrices and no convolutions",
            "Expected lora_A [r, in] and lora_B [out, r], or of a convolution [r, in, k, …] and [out, r, 1, …].",
        )
    if a.shape[0] != b.shape[1]:
        return _Kind(
            "factors whose ranks differ",
            "Expected lora_A [r, in] and lora_B [out, r] with one r. Either the tensors were mixed up, or they are of "
            "a grouped convolution, which is not handled: train without it.",
        )
    if 0 in (*a.shape, *b.shape):
        return _Kind("factors without entries", "Remove the module from the adapter, or save it with rank 1 or more.")
    return None


def _factors(
    module: str,
    a_key: str,
    b_key: str,
    specs: Mapping[str, TensorSpec],
    config: PeftConfig,
    findings: Findings,
) -> Iterator[tuple[str, Factors]]:
    """One module, or as many as there are experts."""
    a, b = specs[a_key].shape, specs[b_key].shape
    parameters = config.parameters_of(module)
    target = parameters[0] if parameters else module
    if "lora_embedding" in a_key:
        yield module, Factors(a_key, b_key, Embedding(), (a[1], b[0]), a[0])
    elif len(a) > 2:
        columns = a[1] * torch.Size(a[2:]).numel()
        yield module, Factors(a_key, b_key, Convolution(a[1], tuple(a[2:])), (b[0], columns), a[0])
    elif len({(config.rank_of(name), config.alpha_of(name)) for name in parameters}) > 1:
        findings.add(
            "fused parameters of one module with ranks or alphas of their own, of which the file does not say which is "
            "which",
            f"'{module}' ({', '.join(parameters)})",
            "Train them with one rank and one alpha.",
        )
    elif parameters and a[0] != config.rank_of(target):
        rank = config.rank_of(target)
        if a[0] % rank:
            findings.add(
                "fused experts whose factors are no multiple of the rank",
                f"'{module}' (lora_A {list(a)}, rank {rank})",
                "Correct 'r' or 'rank_pattern', or take both files from the same save.",
            )
            return
        count = a[0] // rank
        for index in range(count):
            layout = Expert(module, index, count, config.target_parameters)
            yield f"{module}[{index}]", Factors(a_key, b_key, layout, (b[0], a[1]), rank)
    else:
        yield module, Factors(a_key, b_key, LINEAR, (b[0], a[1]), a[0])


def _check_bias(key: str, factors: Factors | None, specs: Mapping[str, TensorSpec], findings: Findings) -> None:
    expected = None if factors is None or isinstance(factors.layout, Embedding) else (factors.shape[0],)
    if specs[key].shape != expected:
        rows = "no lora_B of a linear layer" if expected is None else f"lora_B of {expected[0]} rows"
        shapes = f"'{key}' ({list(specs[key].shape)}, {rows})"
        findings.add("biases that do not fit their lora_B", shapes, f"The tensors were mixed up: {_SAVE} again.")


def _check_types(keys: Iterable[str], specs: Mapping[str, TensorSpec], findings: Findings) -> None:
    for key in keys:
        if specs[key].dtype not in _FACTOR_DTYPES:
            findings.add(
                "factors of a type that is not handled",
                f"'{key}' ({str(specs[key].dtype).removeprefix('torch.')})",
                "Expected float32, float16, bfloat16 or float64: save the adapter in one of them.",
            )
