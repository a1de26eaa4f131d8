"""Bytes: what the machine has, what a module's merge needs, and how sizes are shown."""

from __future__ import annotations

import ctypes
import heapq
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lowrank.spaces import BLOCK_ENTRIES, ModuleShape, Space
from mergekit_lowrank.strategies import Strategy

if TYPE_CHECKING:
    from mergekit_lowrank.engine.plan import Plan

__all__ = ["Footprint", "default_memory_bytes", "footprint", "format_bytes", "overhead_bytes", "settle_allocator"]

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

KRYLOV_BLOCKS, KRYLOV_STEP = 18, 16
"""Of the space that a large dense result is projected on to find its leading directions: noise of 8192 × 8192, the
flattest of spectra, takes 15 blocks, merged updates 5 to 13. A block has 16 columns more than the rank asked for, or
up to 31."""
KRYLOV_CORES = 6
"""Square matrices in float64 that its decomposition holds at once."""

FINISHING_BLOCKS = 6
"""Blocks of rows in float64 that a pass over dense matrices holds for each of them."""

FIXED_BYTES = 16 << 20
"""Of any merge: imports at the first use, buffers of hashes and journals, free parts of the heap (measured: 4 MiB)."""
WORKER_BYTES = 4 << 20
"""Of a thread or a process beyond an interpreter: stacks, its part of the heap (measured: 0.2 and 2 MiB)."""
MODULE_BYTES = 12 << 10
"""Plan, record, receipt and their texts of one module (measured: 6 to 10 KiB)."""
HEADER_BYTES = 2 << 10
"""What is known of one tensor or one input's module before it is read (measured: 1.7 KiB)."""

RECYCLED_BYTES = 24 << 20
"""Below glibc's limit of 32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""
RETURNED_BYTES = 1 << 20
"""Blocks below that are kept even where memory is tight: there are many, and their holes are small."""
HOLES = 2
"""What is held over what is in use, where freed memory is kept (measured: 1.3 to 1.9)."""
READ_AHEAD = 2
"""Modules in flight beyond those being merged."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): bytes kept at the top of the heap, and from which size on a block gets pages of its own."""

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


def settle_allocator(plans: Sequence[Plan], workers: int) -> None:
    """Let the C library keep freed memory for the next module where there is room for that, else give it back at once.

    To keep it saves a fifth to a half of the processor time of merges of adapters: the system zeroes every page that it
    hands out. But blocks of different sizes leave holes, and where matrices are merged entry by entry these grow with
    the matrices, since what is selected from their blocks lies between them. Without glibc it does nothing.

    Args:
        plans: merges that are made together in this process.
        workers: modules that are merged at once.
    """
    modules = [module for plan in plans for module in plan.modules]
    are_dense = any(m.group.strategy.scratch_entries(m.shape, m.group.space) for m in modules)
    in_flight = sum(heapq.nlargest(workers + READ_AHEAD, (module.peak_bytes for module in modules)))
    if are_dense or HOLES * in_flight > min(plan.modules_bytes for plan in plans):
        _settle(mapped_bytes=RETURNED_BYTES, kept_bytes=RETURNED_BYTES)
    else:
        _settle(mapped_bytes=RECYCLED_BYTES, kept_bytes=2 * RECYCLED_BYTES)


def _settle(*, mapped_bytes: int, kept_bytes: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, mapped_bytes)
        library.mallopt(M_TRIM_THRESHOLD, kept_bytes)


@dataclass(frozen=True)
class Footprint:
    """What one module's merge holds at once, at most.

    Attributes:
        peak_bytes: of anonymous memory.
        scratch_bytes: part of it that may lie in a file on disk instead.
    """

    peak_bytes: int
    scratch_bytes: int

    def within(self, limit_bytes: int) -> Footprint:
        """With as much as possible on disk where it is more than the limit; nothing on disk where it is not."""
        if self.peak_bytes <= limit_bytes:
            return Footprint(self.peak_bytes, 0)
        return Footprint(self.peak_bytes - self.scratch_bytes, self.scratch_bytes)


def overhead_bytes(workers: int, modules: int, headers: int) -> int:
    """What a merge holds whatever its modules are: plan, records and headers, threads and their buffers.

    Args:
        workers: modules that are merged at once.
        modules: of the output.
        headers: modules of all inputs, and of the base where it is opened.
    """
    return FIXED_BYTES + workers * WORKER_BYTES + modules * MODULE_BYTES + headers * HEADER_BYTES


def footprint(
    shape: ModuleShape,
    strategy: Strategy,
    space: Space,
    *,
    stored_bytes: int,
    rank: int | None,
    compute_bytes: int,
    canonical: bool = False,
    balanced: bool = False,
) -> Footprint:
    """Upper estimate of what one module's merge holds at once.

    Args:
        shape: of the module.
        strategy: what merges it.
        space: where.
        stored_bytes: of the factors as read; dense inputs are read in blocks.
        rank: of the output, or a bound of it; None where the result is kept whole.
        compute_bytes: of one number in the compute type.
        canonical: whether the inputs' factors are replaced by canonical ones.
        balanced: whether the output's are.
    """
    sides, limit = shape.d_out + shape.d_in, min(shape.d_out, shape.d_in)
    held, on_disk = shape.factor_entries, strategy.scratch_entries(shape, space)
    doubles = DOUBLE_BYTES // compute_bytes
    merging = strategy.working_entries(shape, space) - on_disk
    low_rank = shape.joint_rank - shape.dense * limit
    result_rank = 0 if rank is None and shape.dense else max(rank or 0, min(low_rank, space.merged_rank(shape)))
    # Compression: the result and its thin bases. Diagnostics: [result, inputs], copied by each decomposition.
    block = min(BLOCK_ENTRIES, shape.d_out * shape.d_in)
    finishing = 3 * (low_rank + result_rank) * sides + FINISHING_BLOCKS * block * (shape.dense + 1)
    finishing += CORE_COPIES * min(result_rank, limit) ** 2 * doubles
    projecting = 0
    if on_disk and rank is not None:
        columns = min(KRYLOV_BLOCKS * KRYLOV_STEP * (-(-rank // KRYLOV_STEP) + 1), limit)
        projecting = 2 * columns * sides + KRYLOV_CORES * columns**2 * doubles
    # Factors made canonical stand beside the given ones, and beside the bases of one update at a time.
    if canonical:
        held += shape.factor_entries + CANONICAL_COPIES * max(shape.ranks) * sides
    if balanced:
        finishing += CANONICAL_COPIES * result_rank * sides
    # A method with artefacts looks at its coordinates again in the end.
    stages = (merging, projecting, finishing)
    most = sum(stages) if strategy.has_artefacts() else max(stages)
    return Footprint(stored_bytes + (held + on_disk + most) * compute_bytes, on_disk * compute_bytes)
