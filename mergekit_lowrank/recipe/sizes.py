"""Amounts of bytes as people write them."""

from __future__ import annotations

import re

from mergekit_lowrank.errors import RecipeError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """``512MiB``, ``2GB`` or ``1073741824`` as a number of bytes.

    Raises:
        RecipeError: it is none of these, or zero.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise RecipeError(f"'{text}' is not an amount of memory; expected a number with a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * unit)
