"""Iso-C and Iso-CTS: one singular value for every direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank import LowRankUpdate, MergeContext
from mergekit_lowrank.lowrank import concatenate, norm
from mergekit_lowrank_spectral.cores import (
    Cores,
    CoreStrategy,
    OrthogonalisingParams,
    Triplets,
    leading,
    orthogonalised,
)

__all__ = ["IsoC", "IsoCts"]

PAPER = "Isotropic model merging (arXiv:2502.04959)"


class IsoC(CoreStrategy):
    """mean(S) · U · Vᵀ of Σ w_t ΔW_t = U · diag(S) · Vᵀ, over its non-zero singular values."""

    name = "iso_c"
    summary = "the sum of the updates with all its non-zero singular values replaced by their mean (Iso-C)"
    paper = PAPER
    default_rank = "sum"  # a cut among equal singular values is arbitrary
    Params = OrthogonalisingParams
    params: OrthogonalisingParams

    def merged_core(self, cores: Cores, context: MergeContext) -> Tensor:
        """The sum, flattened: its nuclear norm stays."""
        total = of_sum(cores.weighted(context.weights), cores.directions, self.params.rank_tolerance)
        return total.left @ total.right * mean(total.values)


class IsoCtsParams(OrthogonalisingParams):
    """Parameters of ``iso_cts``."""

    common_space_fraction: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the joint directions that is taken from the sum of the updates; the rest is divided "
        "among the inputs, each of which brings its leading directions outside the sum's",
    )


class IsoCts(CoreStrategy):
    """mean(s) · U* · V*, of the leading triplets of the sum and, for each input, of what they leave of it."""

    name = "iso_cts"
    summary = "directions of the sum and directions of each input, orthogonalised, all at one singular value (Iso-CTS)"
    paper = PAPER
    default_rank = "sum"  # a cut among equal singular values is arbitrary
    Params = IsoCtsParams
    params: IsoCtsParams

    def merged_core(self, cores: Cores, context: MergeContext) -> Tensor:
        """The isotropic core of common and task-specific directions."""
        weighted, tolerance = cores.weighted(context.weights), self.params.rank_tolerance
        own = self.own_directions(cores.directions, len(weighted))
        common = of_sum(weighted, max(0, cores.directions - own * len(weighted)), tolerance)
        rests = [leading(outside(common.left, core), own, tolerance * norm(core)) for core in weighted]
        left, right = orthogonalised([*rests, common], tolerance)
        return left @ right * mean(torch.cat([t.values for t in (*rests, common)]))

    def own_directions(self, directions: int, inputs: int) -> int:
        """How many directions each input brings; the sum keeps what does not divide among them, as in the code."""
        return round((directions - int(directions * self.params.common_space_fraction)) / inputs)


def of_sum(cores: Sequence[LowRankUpdate], count: int, rank_tolerance: float) -> Triplets:
    """The leading triplets of Σ M_t; rounding is relative to the summands, which may cancel."""
    return leading(concatenate(cores, [1.0] * len(cores)), count, rank_tolerance * sum(map(norm, cores)))


def outside(basis: Tensor, core: LowRankUpdate) -> LowRankUpdate:
    """What ``basis`` (p, k) leaves of a core's columns; its rows are left alone, as in the code."""
    return LowRankUpdate(core.b - basis @ (basis.T @ core.b), core.a, core.scaling)


def mean(values: Tensor) -> Tensor:
    """The mean of the values; 0 where there are none."""
    return values.sum() / max(1, values.numel())
