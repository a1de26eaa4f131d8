"""RobustMerge: prune the factors, scale by the gap that pruning leaves, normalise across tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, Update, low_rank, order_statistics, padded_stacks
from mergekit_lowrank.spaces import Coordinates, ModuleShape, Space
from mergekit_lowrank.strategies.base import MergeContext, Params, Strategy
from mergekit_lowrank.strategies.stages import trim_by_magnitude, weighted_sum

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
    stand_in = ("linear", {})  # the authors' code averages what is no factor
    params: RobustMergeParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The merged factors, of the largest input rank; padded components stay out of every denominator."""
        updates = low_rank(coordinates.updates, self.name)
        b, a = padded_stacks(updates)
        whole, a = self._pruned(a, [u.a.numel() for u in updates])
        _, b = self._pruned(b, [u.b.numel() for u in updates])
        scales = self.component_scales(whole, a.abs().sum(dim=2), [u.rank for u in updates])
        factors = [self.params.factor * w * u.scaling for w, u in zip(context.weights, updates, strict=True)]
        b.mul_((scales * scales.new_tensor(factors).unsqueeze(1)).unsqueeze(1))
        ones = a.new_ones(len(updates))
        merged_b = weighted_sum(b, ones).div_(scales.sum(dim=0))
        return LowRankUpdate(merged_b, weighted_sum(a, ones * self.params.factor))

    def _pruned(self, stack: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The L1 norms (n, rows) of the rows of n matrices (n, rows, columns), and the matrices trimmed: new memory.

        Args:
            stack: the matrices.
            sizes: n counts of entries without padding, which is zero.
        """
        magnitudes = stack.abs()
        whole = magnitudes.sum(dim=2)
        if self.params.density == 1:
            return whole, magnitudes.copy_(stack)
        # As the code has it: a float product, then truncation.
        own = [max(1, int(size * (1 - self.params.density))) for size in sizes]
        entries = stack[0].numel()
        ranks = [(k + entries - size,) for k, size in zip(own, sizes, strict=True)]
        thresholds = order_statistics(lambda _: [magnitudes], ranks, entries, stack.dtype)
        return whole, trim_by_magnitude(stack, [threshold for (threshold,) in thresholds], out=magnitudes)

    def component_scales(self, whole: Tensor, left: Tensor, ranks: Sequence[int]) -> Tensor:
        """(n, r): what pruning left of each row of each A, as a ratio ≥ 1, the smaller ones lifted; 0 for padding.

        A row that was pruned away wholly takes the adapter's largest finite ratio, 1 if there is none; the reference
        gives NaN for its column of B, or for all of B.

        Args:
            whole: (n, r), L1 norms of the rows of A.
            left: (n, r), those after pruning.
            ranks: n numbers of rows that are no padding.
        """
        ratio = torch.where(left > 0, whole / torch.where(left > 0, left, 1), 0)
        largest = ratio.amax(dim=1, keepdim=True)
        ratio = torch.where(left > 0, ratio, torch.where(largest > 0, largest, 1))
        rows = torch.arange(ratio.shape[1], device=ratio.device)
        is_own = rows < torch.tensor(ranks, device=ratio.device).unsqueeze(1)
        lifted = [min(int(rank * (1 - self.params.unlifted)), rank - 1) for rank in ranks]
        ordered = torch.where(is_own, ratio, torch.inf).sort(dim=1).values
        lowest = ordered.gather(1, torch.tensor(lifted, device=ratio.device).unsqueeze(1))
        return torch.maximum(ratio, lowest) * is_own

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """The stacks of the space, what is kept of them, both merged factors and temporaries."""
        return space.working_entries(shape) + (shape.inputs + 4) * max(shape.ranks) * (shape.d_out + shape.d_in)
