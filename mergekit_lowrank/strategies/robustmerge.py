"""RobustMerge: prune the factors, scale by the gap that pruning leaves, normalise across tasks."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.lowrank import LowRankUpdate, Update, kth_magnitude
from mergekit_lowrank.spaces import Coordinates, ModuleShape, Space
from mergekit_lowrank.strategies.base import MergeContext, Params, Strategy
from mergekit_lowrank.strategies.stages import trim_by_magnitude

__all__ = ["RobustMerge"]


class RobustMergeParams(Params):
    """Parameters of ``robustmerge``: the constants of the authors' code, named."""

    density: float = Field(
        0.2, ge=0, le=1, description="share of each factor's entries that is kept (the code's mask_ratio); 1 keeps all"
    )
    unlifted: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of an adapter's components, those of largest scale, that keep their scale; the others are "
        "lifted to the smallest of these (the code's att_ratio; the paper has no such step: 1 turns it off)",
    )
    factor: float = Field(
        2.0, gt=0, description="multiplies both merged factors, so the update gets its square (λ = 2 of the paper)"
    )


class RobustMerge(Strategy):
    """Each factor is pruned to its largest entries; s_j = ‖row j of A‖₁ / ‖what pruning leaves of it‖₁.

    A = factor · Σ_t Â_t, and column j of B = factor · Σ_t w_t s_tj B̂_t[:, j] / Σ_t s_tj. α/r is folded into B.
    """

    name = "robustmerge"
    summary = "prunes A and B, scales components by the gap pruning leaves, normalises across tasks"
    paper = "RobustMerge (arXiv:2502.17159)"
    Params = RobustMergeParams
    spaces = ("factors",)
    params: RobustMergeParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The merged factors, of the largest input rank; padded components stay out of every denominator."""
        updates = coordinates.updates
        rank = max(u.rank for u in updates)
        factor = self.params.factor
        a = updates[0].a.new_zeros(rank, updates[0].shape[1])
        b = updates[0].b.new_zeros(updates[0].shape[0], rank)
        total = b.new_zeros(rank)
        for update, weight in zip(updates, context.weights, strict=True):
            pruned = self._pruned(update.a)
            scale = self.component_scales(update.a, pruned)
            a[: update.rank].add_(pruned, alpha=factor)
            b[:, : update.rank].addcmul_(self._pruned(update.b), scale, value=factor * weight * update.scaling)
            total += pad(scale, (0, rank - update.rank))
        return LowRankUpdate(b.div_(total), a)

    def _pruned(self, factor: Tensor) -> Tensor:
        if self.params.density == 1:
            return factor
        # As the code has it: a float product, then truncation.
        threshold = kth_magnitude(factor, max(1, int(factor.numel() * (1 - self.params.density))))
        return trim_by_magnitude(factor.unsqueeze(0), [threshold])[0]

    def component_scales(self, a: Tensor, pruned: Tensor) -> Tensor:
        """(r,): what pruning left of each row of A, as a ratio ≥ 1, the smaller ones lifted.

        A row that was pruned away wholly takes the adapter's largest finite ratio, 1 if there is none; the reference
        gives NaN for its column of B, or for all of B.
        """
        left = pruned.abs().sum(dim=1)
        ratio = torch.where(left > 0, a.abs().sum(dim=1) / torch.where(left > 0, left, 1), 0)
        largest = ratio.max() if bool((left > 0).any()) else ratio.new_ones(())
        ratio = torch.where(left > 0, ratio, largest)
        rank = ratio.shape[0]
        ordered = ratio.sort().values
        return ratio.clamp(min=ordered[min(int(rank * (1 - self.params.unlifted)), rank - 1)])

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """The stacks of the space, both merged factors and the temporaries of one input's."""
        return space.working_entries(shape) + 8 * max(shape.ranks) * (shape.d_out + shape.d_in)
