"""PCB-Merging: entries weighed by how strong they are in their own input and how well the inputs agree on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.spaces import Coordinates, Part
from mergekit_lowrank.strategies.base import (
    ElementwiseStrategy,
    MergeContext,
    Params,
    Survey,
    column,
    per_input,
)
from mergekit_lowrank.strategies.sparsify import Scope
from mergekit_lowrank.strategies.stages import weighted_sum, zeros
from mergekit_lowrank.strategies.thresholds import ThresholdSurvey, thresholds_of

__all__ = ["Pcb"]


class PcbParams(Params):
    """Parameters of ``pcb``."""

    density: float = per_input(
        0.1, gt=0, le=1, description="share of each input's entries that is kept, those of highest score (pcb_ratio)"
    )
    winsorize: float = Field(
        1e-4,
        ge=0,
        lt=0.5,
        description="share of the entries, at either end of the magnitudes, that is drawn in to the last of the others "
        "before anything else (the code's clamp: 1e-4, in its vision and language scripts 1e-2)",
    )
    scope: Scope = "tensor"


class Pcb(ElementwiseStrategy):
    """Scores S_t·X_t decide which entries of an input stay, and with what share.

    S_t = exp(n·norm(|x_t|)²) (intra-balancing) and X_t = tanh(x_t · Σ_s x_s) (inter-balancing), n the inputs and norm
    the min-max scaling of one input. Scores up to the (1 − density) order statistic become 0, the highest 1, those
    between linearly; the result is Σ_t w_t share_t x_t / Σ_t share_t.
    """

    name = "pcb"
    summary = "keeps the entries that are strong in their input and agreed on by the others, weighed by both"
    paper = "PCB-Merging (Du et al. 2024, arXiv:2410.02396)"
    Params = PcbParams
    params: PcbParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """Passes for the magnitudes' bounds and the scores', then one to merge."""
        survey = context.survey if isinstance(context.survey, PcbSurvey) else None
        bounds = self._bounds(part, context, survey)
        limits = survey.scores.of(part, context) if survey else self._limits(self.scored(part, bounds), context)
        lowest, highest = _columns(limits, part)
        weights = column(part.weights, part)
        ones = torch.ones_like(weights)

        def merge(block: Tensor) -> Tensor:
            shares = _rescaled(_scores(block, *bounds), lowest, highest)
            total = weighted_sum(shares, ones)
            values = _winsorized(block, *bounds).copysign_(block).mul_(shares)
            return weighted_sum(values, weights).div_(total.add_(zeros(total)))

        return part.merged(merge)

    def _bounds(self, part: Part, context: MergeContext, survey: PcbSurvey | None) -> tuple[Tensor, Tensor]:
        found = (
            survey.bounds.of(part, context) if survey else thresholds_of(part, context, self.params, self.bound_ranks)
        )
        return _columns(found, part)

    def _limits(self, scored: Part, context: MergeContext) -> list[tuple[float, ...]]:
        return thresholds_of(scored, context, self.params, self.score_ranks)

    def bound_ranks(self, size: int, density: float) -> tuple[int, int]:
        """The magnitudes that the smallest and the largest are drawn in to."""
        del density
        share = self.params.winsorize
        return (min(int(size * share), size - 1) + 1, max(int(size * (1 - share) - 1), 0) + 1)

    def score_ranks(self, size: int, density: float) -> tuple[int, int]:
        """The score up to which nothing is kept, and the highest."""
        return (min(int(size * (1 - density)), size - 1) + 1, size)

    def scored(self, part: Part, bounds: tuple[Tensor, Tensor]) -> Part:
        """The part with the positive part of the scores in place of the coordinates."""
        lowest, highest = bounds
        return replace(part, read=lambda where: _scores(part.read(where), lowest, highest), is_computed=True)

    def survey(self) -> Survey | None:
        """Model-wide bounds and thresholds where ``scope`` asks for them."""
        return PcbSurvey(self) if self.params.scope == "model" else None


def _columns(limits: Iterable[Iterable[float]], part: Part) -> tuple[Tensor, Tensor]:
    lowest, highest = zip(*limits, strict=True)
    return column(lowest, part), column(highest, part)


def _scores(block: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """S·X of every entry, over the constant eⁿ; an entry that opposes the sum has no score."""
    spread = highest - lowest
    strength = _winsorized(block, lowest, highest).sub_(lowest).div_(torch.where(spread > 0, spread, 1))
    intra = strength.square_().sub_(1).mul_(len(block)).exp_()
    return intra.mul_((block * weighted_sum(block, torch.ones_like(spread))).tanh_().relu_())


def _rescaled(scores: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Scores as shares: 0 up to ``lowest``, 1 at ``highest``; where these are one score, 1 at it, but for score 0."""
    spread = highest - lowest
    shares = (scores - lowest).relu_().div_(torch.where(spread > 0, spread, 1))
    if bool((spread > 0).all()):
        return shares
    return torch.where((spread > 0) | (scores < highest) | (highest == 0), shares, 1)


def _winsorized(block: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """The magnitudes, drawn in to the bounds."""
    magnitudes = block.abs()
    torch.maximum(magnitudes, lowest, out=magnitudes)
    return torch.minimum(magnitudes, highest, out=magnitudes)


class PcbSurvey(Survey):
    """Two surveys in turn: the bounds of the magnitudes, then, with these, those of the scores.

    Attributes:
        bounds: of the magnitudes.
        scores: of the scores.
    """

    def __init__(self, strategy: Pcb) -> None:
        self._strategy = strategy
        self.bounds = ThresholdSurvey(strategy.params, strategy.bound_ranks)
        self.scores = ThresholdSurvey(strategy.params, strategy.score_ranks)

    def measure(self, coordinates: Coordinates, context: MergeContext) -> Any:
        """Digit counts of the magnitudes, or of the scores."""
        if not self.bounds.thresholds:
            return self.bounds.measure_parts(coordinates.parts, context)
        found = ((part, _columns(self.bounds.of(part, context), part)) for part in coordinates.parts)
        return self.scores.measure_parts([self._strategy.scored(part, bounds) for part, bounds in found], context)

    def conclude(self, total: Any) -> bool:
        """Narrow what is being selected; go on until the scores are done."""
        if not self.bounds.thresholds:
            self.bounds.conclude(total)
            return True
        return self.scores.conclude(total)
