"""Amounts of bytes as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.strict import expected, told_as

__all__ = ["Size", "bytes_of", "parse_bytes"]

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


def bytes_of(size: str | int | None) -> int | None:
    """A checked size as a number of bytes; None stays None."""
    return None if size is None else parse_bytes(str(size))


def _is_a_size(size: str | int) -> str | int:
    try:
        parse_bytes(str(size))
    except RecipeError:
        raise expected("a size") from None
    return size


Size = Annotated[
    str | int,
    AfterValidator(_is_a_size),
    told_as("an amount of memory with a unit, such as 2GiB"),
    WithJsonSchema({"type": ["string", "integer"], "exclusiveMinimum": 0}),
]
"""A number of bytes, or text with a unit."""
