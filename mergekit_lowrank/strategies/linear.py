"""Weighted average and weighted sum."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import Update, are_low_rank, concatenate
from mergekit_lowrank.spaces import Coordinates, ModuleShape, Space
from mergekit_lowrank.strategies.base import MergeContext, Preset
from mergekit_lowrank.strategies.stages import weighted_sum
from mergekit_lowrank.strategies.sums import SumParams, WeightedSum, summed

__all__ = ["PRESETS", "Linear"]


class LinearParams(SumParams):
    """Parameters of ``linear``."""

    normalize: bool = Field(
        True, description="divide by the sum of all weights (a weighted average); false is task arithmetic: Σ w·ΔW"
    )


class Linear(WeightedSum):
    """Σ_t w_t ΔW_t, divided by Σ w where normalised.

    Exact in every linear space: the factors are concatenated, [w_t s_t B_t] · [A_t], and no matrix is multiplied out.
    Where an input is dense, the coordinates are added up by blocks. In ``factors`` it is what peft calls ``linear``.
    """

    name = "linear"
    summary = "weighted average (or sum) of the updates, exact: a concatenation of factors"
    paper = "Model soups (arXiv:2203.05482); task arithmetic (arXiv:2212.04089)"
    Params = LinearParams
    params: LinearParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The concatenation in linear spaces; in ``factors`` the product of the summed factors, over Σ w."""
        if not coordinates.is_linear:
            return super().merge(coordinates, context)
        coefficients = self.target_weights(context.weights, context.total_weight)
        if are_low_rank(coordinates.updates):
            return concatenate(coordinates.updates, coefficients)
        return coordinates.decode([summed(part, coefficients) for part in coordinates.parts])

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        """Σ_t w_t x_t."""
        return weighted_sum(block, weights)

    def returns_single_input(self) -> bool:
        """Always."""
        return True

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """What the space holds, and the concatenation."""
        if space.name == "delta" and not shape.dense:  # its coordinates are never read
            return 2 * shape.factor_entries
        return super().working_entries(shape, space) + shape.factor_entries

    def scratch_entries(self, shape: ModuleShape, space: Space) -> int:
        """None for a concatenation."""
        return super().scratch_entries(shape, space) if shape.dense or space.name != "delta" else 0


PRESETS = (
    Preset(
        "task_arithmetic",
        Linear,
        "the plain sum Σ w·ΔW, exact: linear without normalisation (peft's `cat` and `svd`)",
        "Editing models with task arithmetic (arXiv:2212.04089)",
        parameters={"normalize": False},
    ),
    Preset(
        "cat",
        Linear,
        "the plain sum Σ w·ΔW with nothing cut: all factors side by side, at rank Σ r (peft's `cat`)",
        "PEFT `add_weighted_adapter`, combination type `cat`",
        parameters={"normalize": False},
        rank="sum",
        low_rank_only=True,
    ),
)
