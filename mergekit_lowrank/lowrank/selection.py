"""The k-th smallest magnitude, exactly, by selection on bit patterns.

Non-negative IEEE floats order like their bit patterns read as integers. So ``numpy.partition`` on the integer view
is exact and far faster than ``torch.kthvalue`` on a CPU, and a radix count over 16-bit digits of the pattern
finds the same value over blocks that are never held together, in two passes for float32 and four for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["RadixSelection", "kth_magnitude", "kth_magnitudes"]

DIGIT_BITS = 16
IN_MEMORY_ENTRIES = 1 << 20
"""Up to this many magnitudes, over all inputs, are gathered and partitioned at once: no more than one block holds."""
SAMPLE_ENTRIES = 1 << 16
"""Entries of the sample that the bracket is taken from, about."""
SAMPLED_BLOCKS_STEP = 4
"""The sample comes from every fourth block."""
MARGIN_DEVIATIONS = 4.0
"""Half the bracket's width, in standard deviations of a sampled quantile."""
MARGIN_SHARE = 0.01
"""Added to it, since blocks of rows differ from each other."""

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]
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


Blocks = Callable[[int], Iterable[Tensor]]
"""Gives every ``step``-th (n, …) block of n stacked inputs; called once a pass."""


def kth_magnitudes(blocks: Blocks, ks: Sequence[int], entries: int, dtype: torch.dtype) -> list[float]:
    """For each of n stacked inputs the k-th smallest magnitude over all blocks, exactly.

    Few entries are gathered. Of many, a sample gives a bracket that the answer almost surely lies in, one pass counts
    what is below it and gathers what is inside; radix passes find the rare answer that is outside.

    Args:
        blocks: the entries.
        ks: n ranks, 1-indexed; 0 gives 0.0.
        entries: of one input, over all blocks.
        dtype: of the blocks, float32 or float64.
    """
    if not any(k > 0 for k in ks):
        return [0.0] * len(ks)
    if entries * len(ks) <= IN_MEMORY_ENTRIES:
        gathered = torch.cat([block.flatten(1) for block in blocks(1)], dim=1)
        return [kth_magnitude(values, k) for values, k in zip(gathered, ks, strict=True)]
    found = _by_bracket(blocks, ks, entries, dtype)
    missed = [t for t, value in enumerate(found) if value is None]
    by_radix = dict(zip(missed, _by_radix(blocks, missed, [ks[t] for t in missed], dtype), strict=True))
    return [by_radix[t] if value is None else value for t, value in enumerate(found)]


def _by_radix(blocks: Blocks, inputs: Sequence[int], ks: Sequence[int], dtype: torch.dtype) -> list[float]:
    """The k-th magnitudes of some of the inputs, one digit a pass."""
    selections = [RadixSelection(dtype, k) for k in ks]
    while not all(selection.done for selection in selections):
        counts = [np.zeros(1 << DIGIT_BITS, np.int64) for _ in selections]
        for block in blocks(1):
            for selection, count, t in zip(selections, counts, inputs, strict=True):
                if not selection.done:
                    count += selection.count(block[t])
        selections = [s if s.done else s.narrowed(c) for s, c in zip(selections, counts, strict=True)]
    return [selection.value for selection in selections]


def _joined(pieces: Sequence[Bits]) -> Bits:
    joined: Bits = np.concatenate(pieces)
    return joined


class _Bracket:
    """Two bit patterns, how many entries lie below and at them, and the entries between them."""

    def __init__(self, sample: Bits, share: float) -> None:
        sample.sort()
        margin = MARGIN_DEVIATIONS * (share * (1 - share) / sample.size) ** 0.5 + MARGIN_SHARE
        positions = [int(sample.size * (share - margin)), int(sample.size * (share + margin))]
        self.low = int(sample[positions[0]]) if positions[0] > 0 else 0
        last = int(np.iinfo(sample.dtype).max)
        self.high = int(sample[positions[1]]) if positions[1] < sample.size else last
        self.below = self.at_low = self.up_to_high = 0
        self.inside: list[Bits] = []

    def add(self, bits: Bits) -> None:
        """Count and gather one block."""
        above, under = bits > self.low, bits < self.high
        self.below += int(np.count_nonzero(bits < self.low))
        self.at_low += int(np.count_nonzero(~above))
        self.up_to_high += int(np.count_nonzero(bits <= self.high))
        self.inside.append(bits[above & under])

    def select(self, k: int) -> int | None:
        """The pattern of the k-th smallest magnitude; None where it lies outside."""
        if not self.below < k <= self.up_to_high:
            return None
        if k <= self.at_low:
            return self.low
        inside = _joined(self.inside)
        if k > self.at_low + inside.size:
            return self.high
        inside.partition(k - self.at_low - 1)
        return int(inside[k - self.at_low - 1])


def _by_bracket(blocks: Blocks, ks: Sequence[int], entries: int, dtype: torch.dtype) -> list[float | None]:
    stride = max(1, entries // (SAMPLED_BLOCKS_STEP * SAMPLE_ENTRIES)) | 1
    samples: list[list[Bits]] = [[] for _ in ks]
    for block in blocks(SAMPLED_BLOCKS_STEP):
        for sample, values in zip(samples, block, strict=True):
            sample.append(_bits(values.flatten()[::stride]))
    brackets = [_Bracket(_joined(s), k / entries) for s, k in zip(samples, ks, strict=True)]
    for block in blocks(1):
        for bracket, values, k in zip(brackets, block, ks, strict=True):
            if k > 0:
                bracket.add(_bits(values))
    patterns = [bracket.select(k) if k > 0 else 0 for bracket, k in zip(brackets, ks, strict=True)]
    return [None if pattern is None else _float(pattern, dtype) for pattern in patterns]
