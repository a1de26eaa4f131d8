"""CART: the average, and the leading directions in which each input departs from it."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from mergekit_lowrank import MergeContext, Params
from mergekit_lowrank.lowrank import concatenate, densify, svd
from mergekit_lowrank_spectral.averages import AveragingStrategy
from mergekit_lowrank_spectral.cores import Cores, CoreStrategy

__all__ = ["Cart"]


class CartParams(Params):
    """Parameters of ``cart``."""

    rank_fraction: float = Field(
        0.08,
        ge=0,
        le=1,
        description="share of the R joint directions kept of each departure, rounded up (8 % is the paper's); 0 and 1 "
        "give the average",
    )
    departure_factor: float = Field(1.0, gt=0, description="multiplies the sum of the departures (λ of the paper)")


class Cart(AveragingStrategy, CoreStrategy):
    """C + λ Σ w_t (ΔW_t − C)_k, C the weighted average and (·)_k the best approximation of rank k."""

    name = "cart"
    summary = "the average plus the leading directions in which each input departs from it (CART)"
    paper = "CART (arXiv:2412.12153)"
    Params = CartParams
    params: CartParams

    def merged_core(self, cores: Cores, context: MergeContext) -> Tensor:
        """The centre and the truncated departures; these are of rank R, whatever the rank of the inputs."""
        kept = math.ceil(self.params.rank_fraction * cores.directions)
        centre = densify(concatenate(cores.updates, self.target_weights(context.weights, context.total_weight)))
        merged = centre.clone()
        for core, weight in zip(cores.updates, context.weights, strict=True):
            u, s, vh = svd(densify(core) - centre)
            merged += u[:, :kept] * (s[:kept] * (weight * self.params.departure_factor)) @ vh[:kept]
        return merged

    def returns_single_input(self) -> bool:
        """Always: one input does not depart from itself."""
        return True
