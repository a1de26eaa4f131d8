"""Thresholds of the whole model: a survey that finds them exactly, one digit of their bit patterns a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_lowrank.lowrank import RadixSelection
from mergekit_lowrank.spaces import Coordinates, Part
from mergekit_lowrank.strategies.base import MergeContext, Params, Survey

__all__ = ["ThresholdSurvey", "thresholds_of"]

Ranks = Callable[[int, float], Sequence[int]]
"""The ranks of the thresholds among so many entries, at a density."""
SignCount = Callable[[Part, MergeContext], int]
"""The sum of the elected signs of a part."""

SIGNS = "signs"


def thresholds_of(part: Part, context: MergeContext, params: Params, ranks: Ranks) -> list[tuple[float, ...]]:
    """The thresholds of each input in one part, exactly.

    Args:
        part: whose magnitudes are ranked.
        context: of the module.
        params: has a ``density``, perhaps one for each input.
        ranks: which of the magnitudes are the thresholds.
    """
    densities = context.each(params, "density")
    own = [_ranks_among(size, density, ranks) for size, density in zip(part.sizes, densities, strict=True)]
    # Padding reads as zeros, below all that is the input's own.
    padding = [part.entries - size for size in part.sizes]
    return part.magnitudes_at([[k + pad if k else 0 for k in ks] for ks, pad in zip(own, padding, strict=True)])


def _ranks_among(size: int, density: float, ranks: Ranks) -> Sequence[int]:
    """The ranks among ``size`` entries; all 0 where there are none, as in the joint space of zero updates."""
    return ranks(size, density) if size else [0] * len(ranks(1, density))


class ThresholdSurvey(Survey):
    """The thresholds of each input over all modules; then, where it is asked for, the majority of elected signs.

    Attributes:
        thresholds: {part: {input: magnitudes}}, once found.
        majority: +1 or -1, the sign of entries whose votes cancel.
        count_signs: set by a strategy that elects and needs the majority; None for no such round.
    """

    def __init__(self, params: Params, ranks: Ranks) -> None:
        self._params, self._ranks = params, ranks
        self._selections: dict[tuple[str, int], list[RadixSelection]] = {}
        self.thresholds: dict[str, dict[int, tuple[float, ...]]] = {}
        self.majority = 1
        self.count_signs: SignCount | None = None

    def measure(self, coordinates: Coordinates, context: MergeContext) -> Tally:
        """Digit counts of each input, or the sum of elected signs once the thresholds are known."""
        if self.thresholds:
            assert self.count_signs is not None  # noqa: S101 - conclude asks for this round only then
            return Tally({SIGNS: sum(self.count_signs(part, context) for part in coordinates.parts)})
        return self.measure_parts(coordinates.parts, context)

    def measure_parts(self, parts: Sequence[Part], context: MergeContext) -> Tally:
        """Digit counts of each input in each part."""
        return Tally({key: found for part in parts for key, found in self._digits(part, context).items()})

    def of(self, part: Part, context: MergeContext) -> list[tuple[float, ...]]:
        """The thresholds of the inputs that have the module."""
        found = self.thresholds[part.name]
        return [found[t] for t in context.participants]

    def _digits(self, part: Part, context: MergeContext) -> dict[tuple[str, int], Digits]:
        keys = [(part.name, t) for t in context.participants]
        selections = [self._selections.get(key, [RadixSelection(part.dtype, 1)]) for key in keys]
        counts = [np.zeros((len(own), 1 << 16), np.int64) for own in selections]
        for block in part.blocks():
            for own, count, values in zip(selections, counts, block, strict=True):
                for selection, row in zip(own, count, strict=True):
                    if not selection.done:
                        row += selection.count(values)
        for own, count, size in zip(selections, counts, part.sizes, strict=True):
            # Padding reads as zeros, in the lowest digit: not the input's own.
            count[:, 0] -= [0 if s.prefix or s.done else part.entries - size for s in own]
        densities = context.each(self._params, "density")
        found = zip(selections, densities, counts, strict=True)
        return {key: Digits(own, density, count) for key, (own, density, count) in zip(keys, found, strict=True)}

    def conclude(self, total: Tally) -> bool:
        """Narrow the selections by one digit; after the last, ask for the signs where the majority matters."""
        if self.thresholds:
            self.majority = 1 if total.values[SIGNS] > 0 else -1
            return False
        self._selections = {key: self._narrowed(key, digits) for key, digits in total.values.items()}
        if not all(selection.done for own in self._selections.values() for selection in own):
            return True
        for (part, t), own in self._selections.items():
            self.thresholds.setdefault(part, {})[t] = tuple(selection.value for selection in own)
        return self.count_signs is not None

    def _narrowed(self, key: tuple[str, int], digits: Digits) -> list[RadixSelection]:
        counts, own = digits.counts, self._selections.get(key)
        if own is None:  # the first round counts all entries: now the ranks are known
            (first,) = digits.selections
            ranks = _ranks_among(int(counts.sum()), digits.density, self._ranks)
            own = [RadixSelection(first.dtype, k) for k in ranks]
            counts = np.repeat(counts, len(own), axis=0)
        return [s if s.done else s.narrowed(row) for s, row in zip(own, counts, strict=True)]


@dataclass(frozen=True)
class Digits:
    """Counts (selections, 65536) of one input's entries by the next digit of each selection."""

    selections: list[RadixSelection]
    density: float
    counts: npt.NDArray[np.int64]

    def __add__(self, other: Digits) -> Digits:
        return Digits(self.selections, self.density, self.counts + other.counts)


@dataclass(frozen=True)
class Tally:
    """Measurements that add up: digits by (part, input), or the sum of signs."""

    values: dict[Any, Any]

    def __add__(self, other: Tally) -> Tally:
        both = {key: self.values[key] + other.values[key] for key in self.values.keys() & other.values.keys()}
        return Tally({**self.values, **other.values, **both})
