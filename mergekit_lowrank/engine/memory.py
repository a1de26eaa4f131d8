"""Bytes: what the machine has, what a module's merge needs, and how sizes are written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.spaces import ModuleShape, Space
from mergekit_lowrank.strategies import Strategy

__all__ = ["default_memory_bytes", "format_bytes", "module_peak_bytes", "parse_bytes"]

DEFAULT_SHARE = 4
"""A merge takes at most one part in this many of the machine's memory unless told otherwise."""
FALLBACK_MEMORY_BYTES = 8 << 30
"""Where the operating system does not tell its memory."""

CONTROL_GROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


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


def format_bytes(count: float) -> str:
    """A number of bytes for people: ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def default_memory_bytes() -> int:
    """A quarter of the memory of the machine, or of the container where that has less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = FALLBACK_MEMORY_BYTES
    return int(min(total, *_container_limits())) // DEFAULT_SHARE


def _container_limits() -> Iterator[float]:
    """What control groups (version 2, version 1) allow, where there are any."""
    yield math.inf
    for path in CONTROL_GROUP_FILES:
        with suppress(OSError, ValueError):
            yield int(path.read_text())  # "max" means no limit


def module_peak_bytes(
    shape: ModuleShape, strategy: Strategy, space: Space, *, stored_bytes: int, rank: int, compute_bytes: int
) -> int:
    """Upper estimate of what one module's merge holds at once.

    Args:
        shape: of the module.
        strategy: what merges it.
        space: where.
        stored_bytes: of the factors as read.
        rank: of the output, or a bound of it.
        compute_bytes: of one number in the compute type.
    """
    held = shape.factor_entries + strategy.working_entries(shape, space)
    # Compression: the result and its thin bases. Diagnostics: [result, inputs], copied by each decomposition.
    result_rank = max(rank, min(shape.joint_rank, space.merged_rank(shape)))
    finishing = 3 * (shape.joint_rank + result_rank) * (shape.d_out + shape.d_in)
    return stored_bytes + (held + finishing) * compute_bytes
