"""Module headers in words: kinds, ranks, scalings and types over several modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mergekit_lowrank.formats import Linear, ModuleHeader, Whole

__all__ = ["kind_of", "kinds_text", "ranks_text", "scaling_rule", "scaling_text", "span", "type_name", "types_text"]

IRREGULAR_PLURALS = {"matrix": "matrices", "bias": "biases"}


def kind_of(header: ModuleHeader) -> str:
    """``matrix``, ``embedding``, ``convolution``, ``expert`` (of a fused parameter) or ``vector``."""
    plain = isinstance(header.layout, Linear | Whole)
    return header.kind if plain else type(header.layout).__name__.lower()


def kinds_text(kinds: Iterable[str]) -> str:
    """``36 matrices, 1 embedding``."""
    return ", ".join(f"{count} {kind if count == 1 else _plural(kind)}" for kind, count in Counter(kinds).items())


def ranks_text(headers: Sequence[ModuleHeader]) -> str:
    """``4 to 16`` for ranks between 4 and 16, ``8`` where all are."""
    return span(header.rank for header in headers)


def scaling_text(headers: Sequence[ModuleHeader]) -> str:
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


def types_text(headers: Sequence[ModuleHeader]) -> str:
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
    return [f"{name} with {len(own)} keys" for name, own in found if isinstance(own, Mapping) and own]
