"""The k-th smallest magnitude, exactly, by selection on bit patterns.

Non-negative IEEE floats order like their bit patterns read as integers. So ``numpy.partition`` on the integer view
is exact and far faster than ``torch.kthvalue`` on a CPU, and a radix count over 16-bit digits of the pattern
finds the same value over blocks that are never held together, in two passes for float32 and four for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["RadixSelection", "kth_magnitude", "kth_magnitudes"]

DIGIT_BITS = 16
IN_MEMORY_ENTRIES = 1 << 24
"""Up to this many magnitudes are gathered and partitioned at once; beyond it the radix passes are used."""

Bits = npt.NDArray[np.int32] | npt.NDArray[np.int64]
_INTEGER_OF = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(values: Tensor) -> Bits:
    """Bit patterns of |values|, flattened; a new array."""
    bits: Bits = values.abs().flatten().view(_INTEGER_OF[values.dtype]).cpu().numpy()
    return bits


def _float(pattern: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(pattern, dtype=_INTEGER_OF[dtype]).view(dtype))


def kth_magnitude(values: Tensor, k: int) -> float:
    """The k-th smallest |x| (1-indexed, ties counted) of a float32 or float64 tensor; 0.0 for k = 0."""
    if k <= 0:
        return 0.0
    if values.device.type == "cuda":
        return float(torch.kthvalue(values.abs().flatten(), k).values)
    bits = _bits(values)
    bits.partition(k - 1)
    return _float(int(bits[k - 1]), values.dtype)


@dataclass(frozen=True)
class RadixSelection:
    """Selection among entries that are only ever seen in blocks: one digit of the answer a pass.

    Attributes:
        dtype: float32 or float64.
        k: the rank still to be found among the entries that share ``prefix``.
        prefix: the digits found so far.
        level: how many they are.
    """

    dtype: torch.dtype
    k: int
    prefix: int = 0
    level: int = 0

    @property
    def levels(self) -> int:
        """Passes that are needed in all."""
        return self.dtype.itemsize * 8 // DIGIT_BITS

    @property
    def done(self) -> bool:
        """Whether every digit is known."""
        return self.k <= 0 or self.level == self.levels

    @property
    def value(self) -> float:
        """The k-th smallest magnitude, once ``done``; 0.0 for k = 0."""
        return 0.0 if self.k <= 0 else _float(self.prefix, self.dtype)

    def count(self, values: Tensor) -> npt.NDArray[np.int64]:
        """How many of ``values`` share the prefix, by their next digit: (65536,). Counts of blocks add up."""
        bits = _bits(values)
        shift = DIGIT_BITS * (self.levels - 1 - self.level)
        if self.level:
            bits = bits[bits >> (shift + DIGIT_BITS) == self.prefix]
        digits = (bits >> shift) & ((1 << DIGIT_BITS) - 1)
        return np.bincount(digits, minlength=1 << DIGIT_BITS)

    def narrowed(self, counts: npt.NDArray[np.int64]) -> RadixSelection:
        """The selection with one digit more, from the counts of all blocks."""
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, self.k))
        before = int(below[digit - 1]) if digit else 0
        return replace(self, k=self.k - before, prefix=self.prefix << DIGIT_BITS | digit, level=self.level + 1)


def kth_magnitudes(
    blocks: Callable[[], Iterable[Tensor]], ks: Sequence[int], entries: int, dtype: torch.dtype
) -> list[float]:
    """For each of n stacked inputs the k-th smallest magnitude over all blocks.

    Args:
        blocks: called once a pass; yields (n, …) tensors.
        ks: n ranks, 1-indexed; 0 gives 0.0.
        entries: of one input, over all blocks; decides between gathering and passes.
        dtype: of the blocks.
    """
    if entries * len(ks) <= IN_MEMORY_ENTRIES:
        gathered = [torch.cat([block[i].flatten() for block in blocks()]) for i in range(len(ks))]
        return [kth_magnitude(values, k) for values, k in zip(gathered, ks, strict=True)]
    selections = [RadixSelection(dtype, k) for k in ks]
    while not all(selection.done for selection in selections):
        counts = [np.zeros(1 << DIGIT_BITS, np.int64) for _ in ks]
        for block in blocks():
            for selection, count, values in zip(selections, counts, block, strict=True):
                if not selection.done:
                    count += selection.count(values)
        selections = [s if s.done else s.narrowed(c) for s, c in zip(selections, counts, strict=True)]
    return [selection.value for selection in selections]
