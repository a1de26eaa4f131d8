"""Sparsify, then add up or elect: the two ways in which what is kept of each input becomes one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    weighted_sum,
    zeros,
)
from mergekit_lowrank.strategies.sums import SumParams, WeightedSum
from mergekit_lowrank.strategies.thresholds import ThresholdSurvey

__all__ = ["ElectedStrategy", "Election", "ElectionParams", "SparseStrategy", "SparseSum"]


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
        return part.merged(lambda block: weighted_sum(trim(part.own(block)), weights))


class ElectionParams(Params):
    """Parameters of a sign election and of the merge that follows."""

    elect: Literal["total", "frequency", "none"] = Field(
        "total",
        description="elect the sign of the sum of the entries, or of the number of entries of each sign; none: every "
        "entry that is kept is merged",
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
    divisor: Literal["absolute_weights", "weights", "count", "inputs"] = Field(
        "absolute_weights",
        description="what the mean divides by, over the inputs kept at that entry: Σ|weight|; Σ weight (mergekit; a "
        "negative weight then flips its own sign back); or their number (peft, the paper's code); inputs: the number "
        "of all inputs that have the module",
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
        if isinstance(context.survey, ThresholdSurvey):
            return self._merged(part, start(), Election(self.params.elect, context.survey.majority))
        election = Election(self.params.elect)
        merged = self._merged(part, start(), election)
        if election.cancelled and self.params.zero_sign == "majority" and election.total <= 0:
            merged = self._merged(part, start(), Election(self.params.elect, -1))
        return merged

    def survey(self) -> Survey | None:
        """Model-wide thresholds where ``scope`` asks for them, and the majority of signs over the model."""
        survey, method = self.sparsify.survey(), self.params.elect
        if survey is not None and method != "none" and self.params.zero_sign == "majority":
            survey.count_signs = partial(self._signs, method)
        return survey

    def _signs(self, method: Literal["total", "frequency"], part: Part, context: MergeContext) -> int:
        votes, _ = self._votes(part, self.sparsify.prepared(part, context)())
        return sum(int(elect_sign(votes(part.own(block)), method).sum()) for block in part.blocks())

    def _votes(self, part: Part, trim: Trim) -> tuple[Trim, Tensor]:
        """What is kept as it votes, and the weights (n, 1, 1) that are not in it yet."""
        weights = column(part.weights, part)
        # Equal weights elect what no weights elect.
        if not self.params.weighted_election or min(part.weights) == max(part.weights) > 0:
            return trim, weights
        return lambda block: trim(block).mul_(weights), torch.ones_like(weights)

    def _merged(self, part: Part, trim: Trim, election: Election) -> Tensor:
        votes, weights = self._votes(part, trim)
        combine = self._combination(part, weights)
        return part.merged(lambda block: combine(*election.hold(votes(part.own(block)))))

    def _combination(self, part: Part, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """What makes one entry of the elected sign and the magnitudes that agree with it."""
        shares = column(part.shares or part.weights, part)
        divisor = {"absolute_weights": shares.abs(), "weights": shares, "count": torch.ones_like(shares)}
        match self.params.disjoint:
            case "mean" if self.params.divisor == "inputs":
                return lambda sign, agreeing: weighted_sum(agreeing, weights / part.inputs).mul_(sign)
            case "mean":
                divisors = divisor[self.params.divisor]
                return lambda sign, agreeing: disjoint_mean(agreeing, weights, divisors, out=agreeing).mul_(sign)
            case "sum":
                return lambda sign, agreeing: weighted_sum(agreeing, weights).mul_(sign)
            case "max":
                return lambda sign, agreeing: disjoint_max(agreeing.mul_(sign).mul_(weights))


@dataclass
class Election:
    """Elects the signs of a part, block by block.

    Attributes:
        method: what is summed, as in ``elect_sign``; ``none`` lets all votes pass.
        undecided: the sign where votes cancel.
        total: the sum of the elected signs so far.
        cancelled: whether votes have cancelled anywhere.
    """

    method: Literal["total", "frequency", "none"] = "total"
    undecided: int = 1
    total: int = 0
    cancelled: bool = False

    def hold(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """The sign (…) of each entry and the magnitudes (n, …) of the votes that have it, the others zero.

        Without an election the sign is 1, and the votes are left as they are.

        Args:
            votes: (n, …); zero means "does not vote". They are overwritten.
        """
        if self.method == "none":
            return torch.ones_like(votes[0]), votes
        sign = elect_sign(votes, self.method)
        self.total += int(sign.sum())  # exact: a block has fewer entries than float32 counts
        undecided = zeros(sign)
        sign.add_(undecided, alpha=self.undecided)
        agreeing = votes.mul_(sign).relu_()
        if not self.cancelled and undecided.sum() > 0:
            votes_kept = weighted_sum(agreeing, agreeing.new_ones(len(agreeing)))
            self.cancelled = bool(torch.dot(votes_kept.flatten(), undecided.flatten()) > 0)
        return sign, agreeing
