"""Bytes: what the machine has, what a module's merge needs, and how sizes are shown."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from mergekit_lowrank.spaces import ModuleShape, Space
from mergekit_lowrank.strategies import Strategy

__all__ = ["default_memory_bytes", "format_bytes", "module_peak_bytes", "recycle_freed_memory"]

DEFAULT_SHARE = 4
"""A merge takes at most one part in this many of the machine's memory unless told otherwise."""
FALLBACK_MEMORY_BYTES = 8 << 30
"""Where the operating system does not tell its memory."""

CANONICAL_COPIES = 4
"""Factors of one update that its canonical form holds at once: bases, singular vectors (twice, for signs), result."""

CORE_COPIES = 12
"""Square matrices in float64 that a decomposition holds at once: inner products, their factor and its inverse, singular
vectors, and the workspace of LAPACK's divide and conquer, four more."""
DOUBLE_BYTES = 8

RECYCLED_BYTES = 24 << 20
"""Below glibc's limit of 32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""

CONTROL_GROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


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


def recycle_freed_memory() -> None:
    """Let the C library reuse what a module frees for the next one.

    glibc asks the system for every large block anew, and the system zeroes it page by page, until one as large has been
    freed; after this one, which is never touched, it keeps blocks of up to 24 MiB. Elsewhere it does nothing.
    """
    torch.empty(RECYCLED_BYTES, dtype=torch.uint8)


def module_peak_bytes(
    shape: ModuleShape,
    strategy: Strategy,
    space: Space,
    *,
    stored_bytes: int,
    rank: int,
    compute_bytes: int,
    canonical: bool = False,
    balanced: bool = False,
) -> int:
    """Upper estimate of what one module's merge holds at once.

    Args:
        shape: of the module.
        strategy: what merges it.
        space: where.
        stored_bytes: of the factors as read.
        rank: of the output, or a bound of it.
        compute_bytes: of one number in the compute type.
        canonical: whether the inputs' factors are replaced by canonical ones.
        balanced: whether the output's are.
    """
    held = shape.factor_entries + strategy.working_entries(shape, space)
    # Compression: the result and its thin bases. Diagnostics: [result, inputs], copied by each decomposition.
    result_rank = max(rank, min(shape.joint_rank, space.merged_rank(shape)))
    sides = shape.d_out + shape.d_in
    finishing = 3 * (shape.joint_rank + result_rank) * sides
    # Factors made canonical stand beside the given ones, and beside the bases of one update at a time.
    if canonical:
        held += shape.factor_entries + CANONICAL_COPIES * max(shape.ranks) * sides
    if balanced:
        finishing += CANONICAL_COPIES * result_rank * sides
    cores = CORE_COPIES * min(result_rank, shape.d_out, shape.d_in) ** 2 * DOUBLE_BYTES
    return stored_bytes + (held + finishing) * compute_bytes + cores
