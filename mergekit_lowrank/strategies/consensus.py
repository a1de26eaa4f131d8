"""Consensus merging: the sum of all inputs, only where enough of them matter to it (TALL masks)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.spaces import Part
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, column, per_input
from mergekit_lowrank.strategies.stages import weighted_sum

__all__ = ["Consensus"]


class ConsensusParams(Params):
    """Parameters of ``consensus``."""

    mask_threshold: float = per_input(
        0.4,
        gt=0,
        description="an input matters to an entry where |own| > threshold · |sum of the others| (the paper's λ, which "
        "it chooses from 0.2 … 0.6 for each task on validation data)",
    )
    agreement: int = Field(
        2,
        ge=1,
        description="inputs that an entry must matter to, or it is dropped (the paper's k): 2 drops what matters to "
        "none or to one alone; never more than the inputs that have the module",
    )


class Consensus(ElementwiseStrategy):
    """Σ_t w_t x_t, kept only where at least ``agreement`` inputs have |w_t x_t| > λ_t · |Σ_s w_s x_s − w_t x_t|."""

    name = "consensus"
    summary = "adds up the inputs, and keeps the entries that matter to at least two of them (TALL masks)"
    paper = "Localizing task information (Wang et al. 2024, arXiv:2405.07813)"
    Params = ConsensusParams
    params: ConsensusParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """One pass: every entry decides for itself."""
        weights = column(part.weights, part)
        thresholds = column(context.each(self.params, "mask_threshold"), part)
        ones = torch.ones_like(weights)
        enough = min(self.params.agreement, part.inputs)

        def merge(block: Tensor) -> Tensor:
            own = part.own(block).mul_(weights)
            total = weighted_sum(own, ones)
            others = (total - own).abs_().mul_(thresholds)
            matters = torch.gt(own.abs_(), others, out=others)
            return total.mul_(torch.ge(weighted_sum(matters, ones), enough, out=torch.empty_like(total)))

        return part.merged(merge)

    def returns_single_input(self) -> bool:
        """Always: one input alone decides."""
        return True
