"""SCE: select entries by their variance over the inputs, weigh inputs by their energy, erase minority signs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.spaces import Part
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, column
from mergekit_lowrank.strategies.sparse import Election
from mergekit_lowrank.strategies.stages import nonzeros, weighted_sum

__all__ = ["Sce"]

SMALLEST_DIVISOR = 1e-6
"""Energy shares of the kept inputs that add up to less than this divide as if they were this (as in mergekit)."""


class SceParams(Params):
    """Parameters of ``sce``."""

    select_topk: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the entries that is kept, for all inputs alike: those whose values differ most between "
        "the inputs (by variance; entries on which all inputs agree exactly do not count); 1 keeps all",
    )


class Sce(ElementwiseStrategy):
    """Select, calculate, erase.

    Entries of small variance over the inputs are left out; an input's share is its mean square over what is left;
    each entry is the mean, by these shares, of the inputs that agree with the sign of their sum.
    """

    name = "sce"
    summary = "keeps entries that differ most between inputs, weighs inputs by their energy, erases minority signs"
    paper = "SCE of FuseChat (Wan et al. 2024, arXiv:2408.07990)"
    Params = SceParams
    params: SceParams

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """Passes for the variance threshold and the energies, then one to merge."""
        threshold = self._threshold(part)
        energies = sum(_energies(_selected(part.own(block), threshold)) for block in part.blocks())
        shares = _shares(torch.as_tensor(energies)).to(part.dtype).view(-1, 1, 1)
        weights = column(part.weights, part)
        divisor = shares * column(part.shares or part.weights, part).abs()

        def merge(block: Tensor) -> Tensor:
            sign, agreeing = Election().hold(_selected(part.own(block), threshold).mul_(weights))
            total = weighted_sum(agreeing, shares).mul_(sign)
            count = weighted_sum(nonzeros(agreeing, out=agreeing), divisor)
            return total.div_(count.clamp_(min=SMALLEST_DIVISOR))

        return part.merged(merge)

    def returns_single_input(self) -> bool:
        """Always: no entry differs between the inputs."""
        return True

    def _threshold(self, part: Part) -> float:
        """The smallest variance that is kept; 0 where all are."""
        if self.params.select_topk == 1:
            return 0.0

        variances = part.merged(_variance)
        differing = int(variances.count_nonzero())
        kept = int(differing * self.params.select_topk)
        rank = part.entries - max(kept, 1) + 1 if differing else 0
        ((threshold,),) = Part.stacked("variance", variances.unsqueeze(0), [1.0]).magnitudes_at([[rank]])
        return threshold


def _variance(block: Tensor) -> Tensor:
    """Over the inputs, by their number; exactly zero where all are equal."""
    shifted = block - block[0]
    each = shifted.new_full((len(block),), 1 / len(block))
    mean = weighted_sum(shifted, each)
    return weighted_sum(shifted.square_(), each).sub_(mean.square_())


def _selected(block: Tensor, threshold: float) -> Tensor:
    """The entries whose variance reaches the threshold, the others zero. The block is overwritten."""
    if not threshold:
        return block
    variance = _variance(block)
    return block.mul_(torch.ge(variance, threshold, out=variance))


def _energies(block: Tensor) -> Tensor:
    """The sum of squares of each input."""
    norms: Tensor = torch.linalg.vector_norm(block.flatten(1), dim=1)
    return norms.double().square()


def _shares(energies: Tensor) -> Tensor:
    """Energies over their sum; equal where all are zero."""
    total = energies.sum()
    return energies / total if total > 0 else torch.full_like(energies, 1 / energies.numel())
