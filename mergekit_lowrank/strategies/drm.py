"""Decom-Renorm-Merge: the joint SVD of all updates, renormalised, then trimmed, elected and averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import Update, order_statistics
from mergekit_lowrank.spaces import Coordinates, JointCoordinates, Part
from mergekit_lowrank.strategies.base import MergeContext, Params, Strategy, column
from mergekit_lowrank.strategies.sparse import Election
from mergekit_lowrank.strategies.stages import disjoint_mean, nonzeros, trim_by_magnitude, weighted_sum

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
    takes_dense = True
    stand_in = ("ties", MappingProxyType({"density": 1.0, "weighted_election": False, "divisor": "count"}))
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

        def together(step: int) -> Iterator[Tensor]:
            return (block.unsqueeze(0) for block in unit.magnitudes(step))

        ((threshold,),) = order_statistics(together, [[rank]], entries, unit.dtype)
        return threshold

    def _merged(self, unit: Part, sigma: Tensor, threshold: float) -> Tensor:
        election = Election()
        merged = self._elected(unit, sigma, threshold, election)
        if election.cancelled and election.total <= 0:
            majority = -1 if election.total else 0
            merged = self._elected(unit, sigma, threshold, Election(undecided=majority))
        return merged

    def _elected(self, unit: Part, sigma: Tensor, threshold: float, election: Election) -> Tensor:
        weights = column(unit.weights, unit)
        limits = [threshold] * unit.inputs

        def trimmed(where: slice) -> Tensor:
            block = unit.own(unit.read(where))
            own = sigma[:, where] if unit.axis == 0 else sigma
            return trim_by_magnitude(block, limits, out=block).mul_(own)

        def merge(block: Tensor) -> Tensor:
            sign, agreeing = election.hold(block)
            if self.params.disjoint_mean:
                return disjoint_mean(agreeing, weights, nonzeros(weights), out=agreeing).mul_(sign)
            return weighted_sum(agreeing, weights / unit.inputs).mul_(sign)

        return replace(unit, read=trimmed, is_computed=True).merged(merge)
