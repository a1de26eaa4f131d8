"""Decom-Renorm-Merge: the joint SVD of all updates, renormalised, then trimmed, elected and averaged."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import Update, kth_magnitudes
from mergekit_lowrank.spaces import Coordinates, JointCoordinates, Part
from mergekit_lowrank.strategies.base import MergeContext, Params, Strategy, column
from mergekit_lowrank.strategies.stages import (
    disjoint_mean,
    elect_sign,
    has_cancelled_votes,
    keep_agreeing,
    trim_by_magnitude,
)

__all__ = ["Drm"]


class DrmParams(Params):
    """Parameters of ``drm``; ``direction`` and ``rank_tolerance`` are those of the joint space."""

    density: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the renormalised entries that is kept, over all inputs together (1 − the reference's "
        "drop rate); 1 prunes nothing but still elects signs",
    )
    disjoint_mean: bool = Field(
        True, description="average over the inputs kept at that entry; false: over all inputs that have the module"
    )


class Drm(Strategy):
    """DRM-H and DRM-V.

    The updates' concatenation is U·diag(S)·[V_1ᵀ … V_Nᵀ]. Each row of V_tᵀ is renormalised to N_t, its norm moved
    into σ_t; one threshold over all N_t trims them; σ_t·N_t elects signs; the agreeing entries, times the weights, are
    averaged to Y; the merged update is U·Y, of rank at most R.
    """

    name = "drm"
    summary = "joint SVD of all updates, rows renormalised, one trim over all, sign election, disjoint mean"
    paper = "Decom-Renorm-Merge (arXiv:2505.23117)"
    Params = DrmParams
    spaces = ("joint",)
    space_defaults = {"rank_tolerance": 1e-2}  # noqa: RUF012 - a read-only class attribute, like the others
    params: DrmParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """U · Y from two passes over blocks of columns: the threshold, then the merge."""
        if not isinstance(coordinates, JointCoordinates):
            raise StrategyError(f"'drm' works in space 'joint', not in {type(coordinates).__name__}")
        joint = coordinates.joint
        norms = joint.right_norms()
        sigma = (joint.singular_values * norms).unsqueeze(2)
        # A task without a part in a direction stays zero there; the reference divides by its rounding.
        unit = coordinates.part(torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1), 0))
        return coordinates.decode([self._merged(unit, sigma, self._threshold(unit))])

    def _threshold(self, unit: Part) -> float:
        entries = unit.inputs * unit.entries
        rank = 0 if self.params.density == 1 else entries - round(entries * self.params.density)
        # All inputs together: one stack of one.
        return kth_magnitudes(lambda step: (b.unsqueeze(0) for b in unit.blocks(step)), [rank], entries, unit.dtype)[0]

    def _merged(self, unit: Part, sigma: Tensor, threshold: float) -> Tensor:
        weights = column(unit.weights, unit)
        limits = [threshold] * unit.inputs
        total, cancelled = 0, False

        def merge(block: Tensor, zero_sign: int = 0) -> Tensor:
            nonlocal total, cancelled
            scaled = trim_by_magnitude(block, limits).mul_(sigma)
            sign = elect_sign(scaled)
            total += int(sign.sum(dtype=torch.int64))
            cancelled = cancelled or has_cancelled_votes(scaled, sign)
            agreeing = keep_agreeing(scaled, sign.add_((sign == 0) * zero_sign)).mul_(weights)
            if self.params.disjoint_mean:
                return disjoint_mean(agreeing, torch.ones_like(weights), torch.ones_like(weights))
            return agreeing.sum(dim=0) / unit.inputs

        merged = unit.merged(merge)
        if cancelled and total:
            majority = 1 if total > 0 else -1
            merged = unit.merged(lambda block: merge(block, majority))
        return merged
