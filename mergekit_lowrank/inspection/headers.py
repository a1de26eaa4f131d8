"""Module headers in words: kinds, ranks, scalings and types over several modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from mergekit_lowrank.formats import Checkpoint, Linear, ModuleHeader, Whole, WholeModel

__all__ = [
    "counted",
    "kind_of",
    "kind_of_checkpoint",
    "kinds_text",
    "ranks_text",
    "scaling_rule",
    "scaling_text",
    "span",
    "type_name",
    "types_text",
]

IRREGULAR_PLURALS = {"matrix": "matrices", "bias": "biases"}
VARIANTS = {"ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}


class Header(Protocol):
    """A module as this file puts it into words."""

    @property
    def rank(self) -> int:
        """Of its factors."""
        ...

    @property
    def scaling(self) -> float:
        """What multiplies them."""
        ...

    @property
    def dtype(self) -> object:
        """Of its tensors."""
        ...


def kind_of_checkpoint(checkpoint: Checkpoint) -> str:
    """``rsLoRA``, ``LoHa (r 3, read as a LoRA of rank 9)`` and the like; ``a whole model``."""
    if isinstance(checkpoint, WholeModel):
        return "a whole model: a base, or what was tuned from one"
    config = checkpoint.config
    if "peft_type" not in config:
        return "LoRA, or read as one"
    name, headers = VARIANTS.get(str(config["peft_type"])), [*checkpoint.modules.values()]
    if name is not None:
        read = f", read as a LoRA of rank {ranks_text(headers)}" if headers else ""
        return f"{name} (r {config.get('init_r', config.get('r'))}{read})"
    if config.get("use_dora"):
        return "DoRA, scaled as rsLoRA" if config.get("use_rslora") else "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def kind_of(header: ModuleHeader) -> str:
    """``matrix``, ``embedding``, ``convolution``, ``expert`` (of a fused parameter) or ``vector``."""
    plain = isinstance(header.layout, Linear | Whole)
    return header.kind if plain else type(header.layout).__name__.lower()


def kinds_text(kinds: Iterable[str]) -> str:
    """``36 matrices, 1 embedding``."""
    return ", ".join(counted(count, kind) for kind, count in Counter(kinds).items())


def counted(count: int, noun: str) -> str:
    """``1 bias``, ``2 biases``."""
    return f"{count} {noun if count == 1 else _plural(noun)}"


def ranks_text(headers: Sequence[Header]) -> str:
    """``4 to 16`` for ranks between 4 and 16, ``8`` where all are."""
    return span(header.rank for header in headers)


def scaling_text(headers: Sequence[Header]) -> str:
    """What multiplies B * A."""
    return span(header.scaling for header in headers)


def scaling_rule(config: Mapping[str, object]) -> str:
    """Where the scalings come from, after the configuration as it is stored."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    if "peft_type" not in config:
        return "stored with the tensors"
    if alpha is None:
        return "none of its own: it is in the factors"
    rule = "alpha / sqrt(r) (rsLoRA)" if config.get("use_rslora") else "alpha / r"
    return ", ".join([f"{rule}, alpha {alpha}", *_patterns(config)])


def types_text(headers: Sequence[Header]) -> str:
    """The stored types."""
    return ", ".join(dict.fromkeys(type_name(header.dtype) for header in headers))


def type_name(dtype: object) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def span(numbers: Iterable[float], form: str = "g") -> str:
    """``4 to 16`` for numbers between 4 and 16, ``8`` where all are."""
    listed = list(numbers)
    low, high = f"{min(listed):{form}}", f"{max(listed):{form}}"
    return low if low == high else f"{low} to {high}"


def _plural(kind: str) -> str:
    return IRREGULAR_PLURALS.get(kind, f"{kind}s")


def _patterns(config: Mapping[str, object]) -> list[str]:
    found = ((name, config.get(name)) for name in ("rank_pattern", "alpha_pattern"))
    return [f"{name} with {counted(len(own), 'key')}" for name, own in found if isinstance(own, Mapping) and own]
