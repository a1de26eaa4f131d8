"""TIES: trim, elect signs, merge what agrees. With its space fixed it is KnOTS-TIES or Core-Space TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import RadixSelection
from mergekit_lowrank.spaces import Coordinates, Part
from mergekit_lowrank.strategies.base import (
    ElementwiseStrategy,
    MergeContext,
    Params,
    Preset,
    Survey,
    column,
    per_input,
)
from mergekit_lowrank.strategies.stages import (
    disjoint_max,
    disjoint_mean,
    elect_sign,
    has_cancelled_votes,
    keep_agreeing,
    trim_by_magnitude,
)

__all__ = ["PRESETS", "Ties"]


class TiesParams(Params):
    """Parameters of ``ties``."""

    density: float = per_input(
        0.2, ge=0, le=1, description="share of each input's entries that is kept; 1 keeps all (and still elects signs)"
    )
    scope: Literal["tensor", "model"] = Field(
        "tensor",
        description="one threshold a module (mergekit, peft), or one over all modules of the same method and "
        "parameters, as the paper's code has it (a survey reads the inputs up to four times)",
    )
    inclusive: bool = Field(
        True,
        description="keep ⌊density·n⌋ + 1 entries, as the paper's code does; false: exactly ⌊density·n⌋ (mergekit, "
        "peft). Entries that tie with the threshold are kept either way",
    )
    elect: Literal["total", "frequency"] = Field(
        "total", description="elect the sign of the sum of the entries, or of the number of entries of each sign"
    )
    weighted_election: bool = Field(
        True, description="elect on weight·entry (mergekit); false: on the entries alone (the paper's code, peft)"
    )
    zero_sign: Literal["majority", "positive"] = Field(
        "majority",
        description="sign where the votes cancel exactly: the majority of all elected signs (negative where that is "
        "0), as the paper's code has it, or positive (mergekit, peft)",
    )
    disjoint: Literal["mean", "sum", "max"] = Field("mean", description="how the entries that agree are merged")
    divisor: Literal["absolute_weights", "weights", "count"] = Field(
        "absolute_weights",
        description="what the mean divides by, over the inputs kept at that entry: Σ|weight|; Σ weight (mergekit; a "
        "negative weight then flips its own sign back); or their number (peft, the paper's code)",
    )


class Ties(ElementwiseStrategy):
    """Trim each input to its largest entries, elect a sign for each entry, average the entries that agree."""

    name = "ties"
    summary = "trims each input, elects a sign for each entry, averages the entries that agree with it"
    paper = "TIES-Merging (Yadav et al. 2023, arXiv:2306.01708)"
    Params = TiesParams
    params: TiesParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """One pass for the thresholds, one to merge; another only where votes cancel and the majority is negative."""
        thresholds = self._thresholds(part, context)
        survey = context.survey
        if isinstance(survey, TiesSurvey):
            return self._merged(part, thresholds, survey.majority, SignTally())
        tally = SignTally()
        merged = self._merged(part, thresholds, 1, tally)
        if tally.cancelled and self.params.zero_sign == "majority" and tally.total <= 0:
            merged = self._merged(part, thresholds, -1, SignTally())
        return merged

    def ranks_of_threshold(self, part: Part, context: MergeContext) -> list[int]:
        """For each input which of its magnitudes, counted from the smallest, is the threshold; 0 keeps all."""
        padding = [part.entries - size for size in part.sizes]
        densities = context.each(self.params, "density")
        ranks = [self.rank_of_threshold(size, density) for size, density in zip(part.sizes, densities, strict=True)]
        return [rank + pad if rank else 0 for rank, pad in zip(ranks, padding, strict=True)]

    def rank_of_threshold(self, size: int, density: float) -> int:
        """The same for ``size`` entries in all."""
        if density == 1:
            return 0
        rank = size - int(size * density) + (0 if self.params.inclusive else 1)
        return min(rank, size)

    def _thresholds(self, part: Part, context: MergeContext) -> list[float]:
        if isinstance(context.survey, TiesSurvey):
            found = context.survey.thresholds[part.name]
            return [found[t] for t in context.participants]
        return part.kth_magnitudes(self.ranks_of_threshold(part, context))

    def elected(self, part: Part, block: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The trimmed entries (n, …) of a block and the elected signs (…), 0 where the votes cancel or are absent."""
        kept = trim_by_magnitude(block, thresholds)
        votes = kept * column(part.weights, part) if self.params.weighted_election else kept
        return kept, elect_sign(votes, self.params.elect)

    def _merged(self, part: Part, thresholds: Sequence[float], zero_sign: int, tally: SignTally) -> Tensor:
        weights = column(part.weights, part)
        shares = weights if part.shares is None else column(part.shares, part)
        divisor = {"absolute_weights": shares.abs(), "weights": shares, "count": torch.ones_like(weights)}

        def merge(block: Tensor) -> Tensor:
            kept, sign = self.elected(part, block, thresholds)
            tally.add(kept, sign)
            sign = sign.add_((sign == 0) * zero_sign)
            # A weighted election compares the sign of w·x, an unweighted one that of x.
            own_sign = sign * weights.sign() if self.params.weighted_election else sign
            agreeing = keep_agreeing(kept, own_sign)
            match self.params.disjoint:
                case "mean":
                    return disjoint_mean(agreeing, weights, divisor[self.params.divisor])
                case "sum":
                    return (agreeing * weights).sum(dim=0)
                case "max":
                    return disjoint_max(agreeing * weights)

        return part.merged(merge)

    def survey(self) -> Survey | None:
        """Model-wide thresholds where ``scope`` asks for them."""
        return TiesSurvey(self) if self.params.scope == "model" else None

    def returns_single_input(self) -> bool:
        """At density 1."""
        return self.params.density == 1


@dataclass
class SignTally:
    """Elected signs of a part: their sum, and whether votes cancelled anywhere."""

    total: int = 0
    cancelled: bool = False

    def add(self, kept: Tensor, sign: Tensor) -> None:
        """Count the signs of one block."""
        self.total += int(sign.sum(dtype=torch.int64))
        self.cancelled = self.cancelled or has_cancelled_votes(kept, sign)


class TiesSurvey(Survey):
    """One threshold for each input over all modules, exactly: a digit of the bit pattern a round; then the majority.

    Attributes:
        thresholds: {part: {input: magnitude}}, once found.
        majority: +1 or -1, the sign of entries whose votes cancel.
    """

    def __init__(self, strategy: Ties) -> None:
        self._strategy = strategy
        self._selections: dict[tuple[str, int], RadixSelection] | None = None
        self.thresholds: dict[str, dict[int, float]] = {}
        self.majority = 1

    def measure(self, coordinates: Coordinates, context: MergeContext) -> Tally:
        """Digit counts of each input, or the sum of elected signs once the thresholds are known."""
        if self.thresholds:
            return Tally({"signs": sum(self._signs(part, context) for part in coordinates.parts)})
        return Tally({key: value for part in coordinates.parts for key, value in self._digits(part, context)})

    def _digits(self, part: Part, context: MergeContext) -> list[tuple[Any, Any]]:
        selections = [
            (self._selections or {}).get((part.name, t), RadixSelection(part.dtype, 1)) for t in context.participants
        ]
        counts = [np.zeros(1 << 16, np.int64) for _ in selections]
        for block in part.blocks():
            for selection, count, values in zip(selections, counts, block, strict=True):
                count += selection.count(values)
        for selection, count, size in zip(selections, counts, part.sizes, strict=True):
            # Padding reads as zeros, in the lowest digit: not the input's own.
            if not selection.prefix:
                count[0] -= part.entries - size
        densities = context.each(self._strategy.params, "density")
        keys = [(part.name, t) for t in context.participants]
        return [
            (key, (part.dtype, density, count)) for key, density, count in zip(keys, densities, counts, strict=True)
        ]

    def _signs(self, part: Part, context: MergeContext) -> int:
        found = self.thresholds[part.name]
        thresholds = [found[t] for t in context.participants]
        tally = SignTally()
        for block in part.blocks():
            tally.add(*self._strategy.elected(part, block, thresholds))
        return tally.total

    def conclude(self, total: Tally) -> bool:
        """Narrow the selections by one digit; after the last, ask for the signs where the majority matters."""
        if self.thresholds:
            self.majority = 1 if total.values["signs"] > 0 else -1
            return False
        narrowed = {}
        for key, (dtype, density, counts) in total.values.items():
            selection = (self._selections or {}).get(key)
            if selection is None:
                selection = RadixSelection(dtype, self._strategy.rank_of_threshold(int(counts.sum()), density))
            narrowed[key] = selection if selection.done else selection.narrowed(counts)
        self._selections = narrowed
        if not all(selection.done for selection in narrowed.values()):
            return True
        for (part, t), selection in narrowed.items():
            self.thresholds.setdefault(part, {})[t] = selection.value
        return self._strategy.params.zero_sign == "majority"


Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tally:
    """Measurements that add up: digit counts by (part, input), sums of signs by name."""

    values: dict[Any, Any]

    def __add__(self, other: Tally) -> Tally:
        merged = dict(self.values)
        for key, value in other.values.items():
            if key not in merged:
                merged[key] = value
            elif isinstance(value, tuple):
                merged[key] = (*value[:2], merged[key][2] + value[2])
            else:
                merged[key] += value
        return Tally(merged)


PRESETS = (
    Preset(
        "knots",
        Ties,
        "TIES in the joint singular directions of all inputs, one threshold over the model (KnOTS-TIES)",
        "KnOTS (Stoica et al. 2024, arXiv:2410.19735)",
        space="joint",
        parameters={"scope": "model"},
    ),
    Preset(
        "core_ties",
        Ties,
        "TIES between the singular vectors of the stacked factors (Core Space)",
        "Core Space Merging (arXiv:2509.17786)",
        space="core",
        parameters={"density": 0.1},
    ),
)
