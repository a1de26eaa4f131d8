"""The k-th smallest magnitude, exactly, by selection on bit patterns.

Non-negative IEEE floats order like their bit patterns read as integers. So ``numpy.partition`` on the integer view
is exact and far faster than ``torch.kthvalue`` on a CPU, and a radix count over 16-bit digits of the pattern
finds the same value over blocks that are never held together, in two passes for float32 and four for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["RadixSelection", "kth_magnitudes", "order_statistics"]

DIGIT_BITS = 16
IN_MEMORY_ENTRIES = 1 << 21
"""Up to this many magnitudes, over all inputs, are gathered and partitioned at once (8 MiB in float32)."""
BRACKETED_ENTRIES = 1 << 21
"""Up to this many that lie in brackets, over all of them, are held; more are counted, which takes a pass more."""
SAMPLE_ENTRIES = 1 << 16
"""Entries of the sample that the bracket is taken from, about."""
SAMPLED_BLOCKS_STEP = 4
"""The sample comes from every fourth block."""
MARGIN_DEVIATIONS = 4.0
"""Half the bracket's width, in standard deviations of a sampled quantile."""
MARGIN_SHARE = 0.01
"""Added to it, since blocks of rows differ from each other."""

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Number: TypeAlias = np.floating[Any]
Values: TypeAlias = npt.NDArray[np.floating[Any]]
_INTEGER_OF = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(values: Tensor) -> Bits:
    """Bit patterns of |values|, flattened; a new array."""
    bits: Bits = values.abs().flatten().view(_INTEGER_OF[values.dtype]).cpu().numpy()
    return bits


def _float(pattern: int, dtype: torch.dtype) -> float:
    single = dtype == torch.float32
    return float(np.array(pattern, np.int32 if single else np.int64).view(np.float32 if single else np.float64))


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
        place = self.levels - 1 - self.level
        if values.device.type == "cuda":
            return self._counted_there(values, place)
        bits = _bits(values)
        if self.level:
            bits = bits[bits >> DIGIT_BITS * (place + 1) == self.prefix]
        digits = bits.view(np.uint16).reshape(-1, self.levels)[:, place]
        return np.bincount(digits, minlength=1 << DIGIT_BITS)

    def _counted_there(self, values: Tensor, place: int) -> npt.NDArray[np.int64]:
        """The same on the device of the values: only the counts leave it."""
        bits = values.abs().flatten().view(_INTEGER_OF[values.dtype])
        if self.level:
            bits = bits[bits >> DIGIT_BITS * (place + 1) == self.prefix]
        digits = (bits >> DIGIT_BITS * place) & ((1 << DIGIT_BITS) - 1)
        counts: npt.NDArray[np.int64] = torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu().numpy()
        return counts

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

    Args:
        blocks: the entries.
        ks: n ranks, 1-indexed; 0 gives 0.0.
        entries: of one input, over all blocks.
        dtype: of the blocks, float32 or float64.
    """

    def magnitudes(step: int) -> Iterator[Tensor]:
        return (block.abs() for block in blocks(step))

    return [found for (found,) in order_statistics(magnitudes, [(k,) for k in ks], entries, dtype)]


def order_statistics(
    blocks: Blocks, ranks: Sequence[Sequence[int]], entries: int, dtype: torch.dtype
) -> list[tuple[float, ...]]:
    """For each of n stacked inputs the entries of these ranks over all blocks, exactly.

    Few entries are gathered. Of many, a sample gives a bracket that each answer almost surely lies in, one pass counts
    what is below it and gathers what is inside; where that is too much to hold, two passes count that too. Radix passes
    find the rare answer that is outside.

    Args:
        blocks: the entries, none of them negative; they may be overwritten.
        ranks: for each input its ranks, counted from the smallest (1-indexed); 0 gives 0.0.
        entries: of one input, over all blocks.
        dtype: of the blocks, float32 or float64.
    """
    wanted = [_Wanted(t, k) for t, ks in enumerate(ranks) for k in sorted({*ks}) if k > 0]
    if not wanted:
        found: Iterable[float | None] = []
    elif entries * len(ranks) <= IN_MEMORY_ENTRIES:
        found = _gathered(blocks, wanted)
    else:
        found = _by_bracket(blocks, wanted, entries)
    known = dict(zip(wanted, found, strict=True))
    missed = [want for want, value in known.items() if value is None]
    known |= dict(zip(missed, _by_radix(blocks, missed, dtype), strict=True))
    return [tuple(known.get(_Wanted(t, k)) or 0.0 for k in ks) for t, ks in enumerate(ranks)]


class _Wanted(NamedTuple):
    """The entry of rank ``k`` of one input."""

    input: int
    k: int


def _gathered(blocks: Blocks, wanted: Sequence[_Wanted]) -> Iterator[float]:
    """From all blocks at once."""
    held = list(blocks(1))
    for t, group in groupby(wanted, key=lambda want: want.input):
        pieces = [block[t].flatten() for block in held]
        values = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        places = [want.k - 1 for want in group]
        bits = values.view(_INTEGER_OF[values.dtype]).cpu().numpy()
        bits.partition(places)
        yield from (_float(int(bits[place]), values.dtype) for place in places)


def _by_radix(blocks: Blocks, wanted: Sequence[_Wanted], dtype: torch.dtype) -> list[float]:
    """One digit a pass."""
    selections = [RadixSelection(dtype, want.k) for want in wanted]
    while not all(selection.done for selection in selections):
        counts = [np.zeros(1 << DIGIT_BITS, np.int64) for _ in selections]
        for block in blocks(1):
            for selection, count, want in zip(selections, counts, wanted, strict=True):
                count += selection.count(block[want.input])
        selections = [s.narrowed(c) for s, c in zip(selections, counts, strict=True)]
    return [selection.value for selection in selections]


def _by_bracket(blocks: Blocks, wanted: Sequence[_Wanted], entries: int) -> list[float | None]:
    """From one pass or a few, after that of the sample; None where an answer lies outside its bracket."""
    samples = _samples(blocks, max(1, entries // (SAMPLED_BLOCKS_STEP * SAMPLE_ENTRIES)) | 1)
    ends = [_ends(samples[want.input], want.k / entries) for want in wanted]
    shares = (_share(samples[want.input], *own) for want, own in zip(wanted, ends, strict=True))
    if entries * sum(shares) > BRACKETED_ENTRIES:
        return _counted(blocks, wanted, [_Patterns.between(*own) for own in ends])
    brackets = [_Bracket(*own) for own in ends]
    for block in blocks(1):
        for bracket, want in zip(brackets, wanted, strict=True):
            bracket.add(block[want.input].flatten())
    return [bracket.select(want.k) for bracket, want in zip(brackets, wanted, strict=True)]


def _counted(blocks: Blocks, wanted: Sequence[_Wanted], found: Sequence[_Patterns | None]) -> list[float | None]:
    """From passes that narrow the bit patterns of each answer until there is one; no entry is held."""
    while not all(own is None or own.is_answer for own in found):
        for block in blocks(1):
            for own, want in zip(found, wanted, strict=True):
                if own and not own.is_answer:
                    own.add(block[want.input].flatten())
        found = [own and own.narrowed(want.k) for own, want in zip(found, wanted, strict=True)]
    return [float(own.low) if own else None for own in found]


def _samples(blocks: Blocks, stride: int) -> Values:
    """(n, …): every so many-th entry of some of the blocks, each input's sorted."""
    # Contiguous, since a view would keep its block.
    taken = [block.flatten(1)[:, ::stride].contiguous().cpu().numpy() for block in blocks(SAMPLED_BLOCKS_STEP)]
    samples: Values = np.concatenate(taken, axis=1)
    samples.sort(axis=1)
    return samples


def _ends(sample: Values, share: float) -> tuple[Number, Number]:
    """Two numbers that a quantile almost surely lies between, from a sorted sample; -1 and inf beyond its ends."""
    margin = MARGIN_DEVIATIONS * (share * (1 - share) / sample.size) ** 0.5 + MARGIN_SHARE
    first, last = int(sample.size * (share - margin)), int(sample.size * (share + margin))
    number = sample.dtype.type  # a comparison with another type would convert every entry
    return sample[first] if first > 0 else number(-1), sample[last] if last < sample.size else number(np.inf)


def _share(sample: Values, low: Number, high: Number) -> float:
    """How much of a sorted sample lies between two numbers, both included."""
    return int(np.searchsorted(sample, high, "right") - np.searchsorted(sample, low)) / sample.size


class _Patterns:
    """Consecutive bit patterns that an answer is among; how many entries lie below them, and in each part of them.

    Attributes:
        low: the number of the first pattern.
        high: the number of the last.
        is_answer: whether there is but one, and entries have been found there.
    """

    def __init__(self, low: Number, high: Number, *, is_answer: bool = False) -> None:
        self.low, self.high, self.is_answer = low, high, is_answer
        span = _pattern(high) - _pattern(low)
        self._shift = max(0, int(span).bit_length() - DIGIT_BITS)
        self._counts = np.zeros((int(span) >> self._shift) + 1, np.int64)
        self._below = 0

    @classmethod
    def between(cls, low: Number, high: Number) -> _Patterns:
        """Those from ``low``, or zero, to ``high``."""
        return cls(max(low, type(low)(0)), high)

    def add(self, values: Tensor) -> None:
        """Count one block."""
        split = _split if values.device.type == "cpu" else _split_there
        kind, first = type(self.low), _pattern(self.low)
        before = _number(int(first) - 1, kind) if first else kind(-1)
        after = _number(int(_pattern(self.high)) + 1, kind) if self.high < np.inf else self.high
        below, inside = split(values, before, after)
        self._below += below
        parts = (inside.view(_integer(kind)) - first) >> self._shift
        self._counts += np.bincount(parts, minlength=len(self._counts))

    def narrowed(self, k: int) -> _Patterns | None:
        """The part with the k-th smallest entry; None where that lies outside."""
        up_to, place = np.cumsum(self._counts), k - self._below
        if not 0 < place <= up_to[-1]:
            return None
        first = int(_pattern(self.low)) + (int(np.searchsorted(up_to, place)) << self._shift)
        last = min(first + (1 << self._shift) - 1, int(_pattern(self.high)))
        low, high = (_number(pattern, type(self.low)) for pattern in (first, last))
        return _Patterns(low, high, is_answer=not self._shift)


def _integer(kind: type[Number]) -> type[np.signedinteger[Any]]:
    return np.int32 if kind is np.float32 else np.int64


def _pattern(number: Number) -> Any:
    return number.view(_integer(type(number)))


def _number(pattern: int, kind: type[Number]) -> Any:
    return _integer(kind)(pattern).view(kind)


class _Bracket:
    """An open interval around a quantile; how many entries lie up to its lower end, and those inside it."""

    def __init__(self, low: Number, high: Number) -> None:
        self._low, self._high = low, high
        self._up_to_low = 0
        self._inside: list[Values] = []

    def add(self, values: Tensor) -> None:
        """Count and gather one block."""
        split = _split if values.device.type == "cpu" else _split_there
        up_to_low, inside = split(values, self._low, self._high)
        self._up_to_low += up_to_low
        self._inside.append(inside)

    def select(self, k: int) -> float | None:
        """The k-th smallest entry; None where it lies outside."""
        place = k - self._up_to_low - 1
        if place < 0:
            return 0.0 if self._low == 0 else None
        inside = np.concatenate(self._inside)
        if place >= inside.size:
            return None
        inside.partition(place)
        return float(inside[place])


def _split(values: Tensor, low: Number, high: Number) -> tuple[int, Values]:
    """How many values are at most ``low``, and those between it and ``high``."""
    entries: Values = values.numpy()
    inside = entries > low
    up_to_low = entries.size - int(np.count_nonzero(inside))
    inside &= entries < high
    return up_to_low, entries.take(np.flatnonzero(inside))  # twice as fast as entries[inside] where few are


def _split_there(values: Tensor, low: Number, high: Number) -> tuple[int, Values]:
    """The same on the device of the values: only those between leave it."""
    above = values > float(low)
    inside: Values = values[above & (values < float(high))].cpu().numpy()
    return values.numel() - int(above.sum()), inside
