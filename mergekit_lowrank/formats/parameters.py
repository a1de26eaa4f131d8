"""What the names, shapes and types of a model's tensors say of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lowrank.formats.tensors import TensorSpec

__all__ = [
    "Renaming",
    "has_tied_name",
    "is_conv1d",
    "is_output",
    "is_parameter",
    "kind_of",
    "matrix_shape",
    "module_of",
    "tie_order",
    "ties_outputs",
]

_TOKEN_EMBEDDINGS = (
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "word_embedding",
    "tok_embeddings",
    "token_embedding",
    "embed_in",
    "embeddings",
)
"""The last part of their names; where several are tied, the first of these stands for all."""

_EMBEDDINGS = (
    *_TOKEN_EMBEDDINGS,
    "wpe",
    "embed_positions",
    "position_embeddings",
    "position_embedding",
    "token_type_embeddings",
    "relative_attention_bias",
)

_OUTPUTS = ("lm_head", "embed_out", "proj_out", "generator_lm_head", "predictions.decoder", "lm_head.decoder")
"""How the names of output layers end that transformers may tie to an embedding."""

_TIED_BIASES = (
    "predictions.bias",
    "lm_head.bias",
    *(f"{name}.bias" for name in ("predictions.decoder", "lm_head.decoder")),
)

# transformers.pytorch_utils.Conv1D stores (in, out). Only these models have it, under these names.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")

# Constants that some versions of transformers stored with the parameters: rotary frequencies, causal masks.
_BUFFER = re.compile(r"(^|\.)((original_)?inv_freq|masked_bias)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def is_output(key: str) -> bool:
    """Whether a tensor or module of this name is an output layer that may be tied to an embedding."""
    return _ends_in(key.removesuffix(".weight"), _OUTPUTS)


def has_tied_name(key: str) -> bool:
    """Whether a tensor of this name, no output layer, may be stored under another name too."""
    return _ends_in(key, _TIED_BIASES) or _last_part(key) in _TOKEN_EMBEDDINGS


def ties_outputs(config: Mapping[str, object]) -> bool:
    """Whether a model ties its output layer to its embedding: transformers does unless the configuration forbids it."""
    language = config.get("text_config")
    parts = (config, language if isinstance(language, Mapping) else {})
    return all(part.get("tie_word_embeddings") is not False for part in parts)


def is_conv1d(module: str, config: Mapping[str, object]) -> bool:
    """Whether the weight of a module is stored as (in, out), in a model that is or holds one of those that do."""
    return module.rpartition(".")[2] in _CONV1D_NAMES and _has_conv1d(config)


def _has_conv1d(config: Mapping[str, object]) -> bool:
    parts = (part for part in config.values() if isinstance(part, Mapping))
    return config.get("model_type") in _CONV1D_MODELS or any(map(_has_conv1d, parts))


def is_parameter(key: str, spec: TensorSpec) -> bool:
    """Whether a tensor is trained: integers and masks are not, nor are buffers that a model computes by itself."""
    is_mask = len(spec.shape) == 4 and _MASK.search(key) is not None
    return spec.dtype.is_floating_point and 0 not in spec.shape and not is_mask and _BUFFER.search(key) is None


def module_of(key: str, spec: TensorSpec) -> str:
    """The name of the module that a parameter is."""
    return key.removesuffix(".weight") if len(spec.shape) == 2 else key


def kind_of(key: str, spec: TensorSpec) -> Literal["matrix", "vector", "embedding"]:
    """What a parameter is to a merge; see ``ModuleHeader``."""
    if len(spec.shape) != 2 or not key.endswith("weight"):
        return "vector"
    return "embedding" if _last_part(key) in _EMBEDDINGS else "matrix"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) as which a parameter is merged."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def tie_order(key: str) -> tuple[int, str]:
    """Sorts first, of tensors that are one parameter, the one that stands for it."""
    name = _last_part(key)
    return (_TOKEN_EMBEDDINGS.index(name) if name in _TOKEN_EMBEDDINGS else len(_TOKEN_EMBEDDINGS), key)


def _last_part(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


@dataclass(frozen=True)
class Renaming:
    """How the names of one file become those of another: a prefix added or taken away.

    Args:
        add: what is put before each name.
        remove: what is taken from it, where it is there.
    """

    add: str = ""
    remove: str = ""

    def __call__(self, name: str) -> str:
        """The name in the other file."""
        return self.add + name.removeprefix(self.remove)

    @classmethod
    def between(cls, names: Sequence[str], known: Mapping[str, object]) -> Renaming:
        """The one that makes all names known; none at all where there is none, or more than one."""
        unknown = next((name for name in names if name not in known), None)
        if unknown is None:
            return cls()
        fitting = [own for own in cls._candidates(unknown, known) if own._fits(names, known)]
        return fitting[0] if len(fitting) == 1 else cls()

    def _fits(self, names: Sequence[str], known: Mapping[str, object]) -> bool:
        return all(self(name) in known for name in names) and len({self(name) for name in names}) == len(set(names))

    @classmethod
    def _candidates(cls, name: str, known: Mapping[str, object]) -> Iterator[Renaming]:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) + "." for length in range(1, len(parts)))
        yield from (cls(remove=prefix) for prefix in prefixes if name.removeprefix(prefix) in known)
        yield from (cls(add=other.removesuffix(name)) for other in known if other.endswith(f".{name}"))
