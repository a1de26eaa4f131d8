"""Module headers in words: ranks, scalings and types over several modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergekit_lowrank.formats import ModuleHeader

__all__ = ["ranks_text", "scaling_text", "type_name", "types_text"]


def ranks_text(headers: Sequence[ModuleHeader]) -> str:
    """``4 to 16`` for ranks between 4 and 16, ``8`` where all are."""
    return _span(header.rank for header in headers)


def scaling_text(headers: Sequence[ModuleHeader]) -> str:
    """What multiplies B * A."""
    return _span(header.scaling for header in headers)


def types_text(headers: Sequence[ModuleHeader]) -> str:
    """The stored types."""
    return ", ".join(dict.fromkeys(type_name(header.dtype) for header in headers))


def type_name(dtype: object) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def _span(numbers: Iterable[float]) -> str:
    listed = list(numbers)
    low, high = f"{min(listed):g}", f"{max(listed):g}"
    return low if low == high else f"{low} to {high}"
