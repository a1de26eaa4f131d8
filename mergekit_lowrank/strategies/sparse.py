"""Sparsify, then add up or elect: the two ways in which what is kept of each input becomes one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.spaces import Part
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, Survey, column
from mergekit_lowrank.strategies.sparsify import Sparsifier, SparsifierParams, Trim
from mergekit_lowrank.strategies.stages import (
    disjoint_max,
    disjoint_mean,
    elect_sign,
    has_cancelled_votes,
    keep_agreeing,
)
from mergekit_lowrank.strategies.sums import SumParams, WeightedSum
from mergekit_lowrank.strategies.thresholds import ThresholdSurvey

__all__ = ["ElectedStrategy", "ElectionParams", "SparseStrategy", "SparseSum"]


class SparseStrategy(ElementwiseStrategy):
    """A method that keeps some entries of each input before it merges them.

    A family names its sparsifier and derives ``Params`` from those of the sparsifier and of the merge.

    Class attributes:
        sparsifier: what decides which entries are kept.
    """

    sparsifier: ClassVar[type[Sparsifier]]
    params: SparsifierParams

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.sparsify = self.sparsifier(self.params)

    def survey(self) -> Survey | None:
        """Model-wide thresholds where ``scope`` asks for them."""
        return self.sparsify.survey()

    def returns_single_input(self) -> bool:
        """At density 1."""
        return self.params.density == 1


class SparseSumParams(SparsifierParams, SumParams):
    """What ``SparseSum`` asks of its parameters."""


class SparseSum(SparseStrategy, WeightedSum):
    """Σ_t w_t · kept(x_t), divided by Σ w where normalised."""

    params: SparseSumParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """One pass, after those of the sparsifier."""
        trim = self.sparsify.prepared(part, context)()
        weights = column(part.weights, part)
        return part.merged(lambda block: trim(block).mul_(weights).sum(dim=0))


class ElectionParams(Params):
    """Parameters of a sign election and of the merge that follows."""

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


class ElectedParams(SparsifierParams, ElectionParams):
    """What ``ElectedStrategy`` asks of its parameters."""


class ElectedStrategy(SparseStrategy):
    """Elects a sign for each entry from what is kept, and merges the entries that agree with it.

    Source: TIES-Merging (Yadav et al. 2023, arXiv:2306.01708), section 3.
    """

    params: ElectedParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """One pass to merge; another only where votes cancel and the majority is negative."""
        start = self.sparsify.prepared(part, context)
        survey = context.survey
        if isinstance(survey, ThresholdSurvey):
            return self._merged(part, start(), survey.majority, SignTally())
        tally = SignTally()
        merged = self._merged(part, start(), 1, tally)
        if tally.cancelled and self.params.zero_sign == "majority" and tally.total <= 0:
            merged = self._merged(part, start(), -1, SignTally())
        return merged

    def survey(self) -> Survey | None:
        """Model-wide thresholds where ``scope`` asks for them, and the majority of signs over the model."""
        survey = self.sparsify.survey()
        if survey is not None and self.params.zero_sign == "majority":
            survey.count_signs = self._signs
        return survey

    def _signs(self, part: Part, context: MergeContext) -> int:
        trim, tally = self.sparsify.prepared(part, context)(), SignTally()
        for block in part.blocks():
            kept = trim(block)
            tally.add(kept, self._elected(part, kept))
        return tally.total

    def _elected(self, part: Part, kept: Tensor) -> Tensor:
        """(…), 0 where the votes cancel or are absent."""
        votes = kept * column(part.weights, part) if self.params.weighted_election else kept
        return elect_sign(votes, self.params.elect)

    def _merged(self, part: Part, trim: Trim, zero_sign: int, tally: SignTally) -> Tensor:
        weights = column(part.weights, part)
        combine = self._combination(part, weights)

        def merge(block: Tensor) -> Tensor:
            kept = trim(block)
            sign = self._elected(part, kept)
            tally.add(kept, sign)
            sign = sign.add_((sign == 0) * zero_sign)
            # A weighted election compares the sign of w·x, an unweighted one that of x.
            own_sign = sign * weights.sign() if self.params.weighted_election else sign
            return combine(keep_agreeing(kept, own_sign))

        return part.merged(merge)

    def _combination(self, part: Part, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """What makes one entry of those that agree."""
        shares = weights if part.shares is None else column(part.shares, part)
        divisor = {"absolute_weights": shares.abs(), "weights": shares, "count": torch.ones_like(weights)}
        match self.params.disjoint:
            case "mean":
                return lambda agreeing: disjoint_mean(agreeing, weights, divisor[self.params.divisor])
            case "sum":
                return lambda agreeing: (agreeing * weights).sum(dim=0)
            case "max":
                return lambda agreeing: disjoint_max(agreeing * weights)


@dataclass
class SignTally:
    """Elected signs of a part: their sum, and whether votes cancelled anywhere."""

    total: int = 0
    cancelled: bool = False

    def add(self, kept: Tensor, sign: Tensor) -> None:
        """Count the signs of one block."""
        self.total += int(sign.sum(dtype=torch.int64))
        self.cancelled = self.cancelled or has_cancelled_votes(kept, sign)
