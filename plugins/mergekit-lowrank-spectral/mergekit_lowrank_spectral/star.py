"""STAR: every update cut to its leading directions, its nuclear norm restored, then the average."""

from __future__ import annotations

import torch
from pydantic import Field

from mergekit_lowrank import Coordinates, LowRankUpdate, MergeContext, ModuleShape, Params, Space, Update
from mergekit_lowrank.lowrank import concatenate, factorise, low_rank
from mergekit_lowrank_spectral.averages import AveragingStrategy

__all__ = ["Star"]


class StarParams(Params):
    """Parameters of ``star``."""

    nuclear_share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="share of an update's nuclear norm, the sum of its singular values, that the kept directions must "
        "reach (η of the paper, there in percent); one direction is always kept",
    )


class Star(AveragingStrategy):
    """The average of the updates, each cut to its leading directions and scaled back to its nuclear norm.

    The truncation is exact, from the SVD of each update's core, and the result is a concatenation.
    """

    name = "star"
    summary = "cuts each update to its leading directions, restores its nuclear norm, averages (STAR)"
    paper = "STAR (arXiv:2502.10339)"
    Params = StarParams
    spaces = ("delta",)
    params: StarParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The average of the truncated updates."""
        coefficients = self.target_weights(context.weights, context.total_weight)
        return concatenate(
            [self.truncated(update) for update in low_rank(coordinates.updates, self.name)], coefficients
        )

    def truncated(self, update: LowRankUpdate) -> LowRankUpdate:
        """The least number of leading directions that reach the share, scaled to the nuclear norm of all of them."""
        whole = factorise(update, update.rank, torch.Generator())
        reached = whole.spectrum.values.cumsum(0)
        if not reached.numel() or not reached[-1]:
            return whole.cut(0)
        kept = int((reached < self.params.nuclear_share * reached[-1]).sum()) + 1
        return whole.cut(kept).scaled(float(reached[-1] / reached[kept - 1]))

    def returns_single_input(self) -> bool:
        """Where nothing is cut."""
        return self.params.nuclear_share == 1

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """The truncated updates, their concatenation, and the bases and core of one; no coordinate is read."""
        return 3 * shape.factor_entries + 8 * max(shape.ranks) ** 2

    def scratch_entries(self, shape: ModuleShape, space: Space) -> int:
        """None of them."""
        return 0
