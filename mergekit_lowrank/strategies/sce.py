"""SCE: select entries by their variance over the inputs, weigh inputs by their energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import kth_magnitudes
from mergekit_lowrank.spaces import Part
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, column
from mergekit_lowrank.strategies.stages import elect_sign, keep_agreeing

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
        energies = sum(_selected(block, threshold).square().sum(dim=(1, 2)).double() for block in part.blocks())
        shares = _shares(torch.as_tensor(energies)).to(part.dtype).view(-1, 1, 1)
        weights = column(part.weights, part)
        own = weights if part.shares is None else column(part.shares, part)

        def merge(block: Tensor) -> Tensor:
            weighted = _selected(block, threshold) * weights
            sign = elect_sign(weighted)
            agreeing = keep_agreeing(weighted, sign + (sign == 0))
            divisor = (agreeing.sign().abs() * own.abs() * shares).sum(dim=0)
            return (agreeing * shares).sum(dim=0) / divisor.clamp(min=SMALLEST_DIVISOR)

        return part.merged(merge)

    def returns_single_input(self) -> bool:
        """Always: no entry differs between the inputs."""
        return True

    def _threshold(self, part: Part) -> float:
        """The smallest variance that is kept; 0 where all are."""
        if self.params.select_topk == 1:
            return 0.0

        def variances(step: int) -> Iterator[Tensor]:
            return (_variance(block).unsqueeze(0) for block in part.blocks(step))

        differing = sum(int(variance.count_nonzero()) for variance in variances(1))
        kept = int(differing * self.params.select_topk)
        rank = part.entries - max(kept, 1) + 1 if differing else 0
        return kth_magnitudes(variances, [rank], part.entries, part.dtype)[0]


def _variance(block: Tensor) -> Tensor:
    """Over the inputs, by their number."""
    return block.var(dim=0, unbiased=False)


def _selected(block: Tensor, threshold: float) -> Tensor:
    """The entries whose variance reaches the threshold, the others zero."""
    return block * (_variance(block) >= threshold) if threshold else block


def _shares(energies: Tensor) -> Tensor:
    """Energies over their sum; equal where all are zero."""
    total = energies.sum()
    return energies / total if total > 0 else torch.full_like(energies, 1 / energies.numel())
