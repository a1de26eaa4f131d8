"""Weighted average and weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import Update, concatenate
from mergekit_lowrank.spaces import Coordinates, ModuleShape, Space
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, Preset

__all__ = ["PRESETS", "Linear"]

NEGLIGIBLE_TOTAL = 1e-8
"""|Σ w| below this cannot normalise an average (mergekit uses the same bound and then silently divides by 1)."""


class LinearParams(Params):
    """Parameters of ``linear``."""

    normalize: bool = Field(
        True, description="divide by the sum of all weights (a weighted average); false is task arithmetic: Σ w·ΔW"
    )


class Linear(ElementwiseStrategy):
    """Σ_t w_t ΔW_t, divided by Σ w where normalised.

    Exact in every linear space: the factors are concatenated, [w_t s_t B_t] · [A_t], and no matrix is multiplied out.
    In ``factors`` it is what peft calls ``linear``.
    """

    name = "linear"
    summary = "weighted average (or sum) of the updates, exact: a concatenation of factors"
    paper = "Model soups (arXiv:2203.05482); task arithmetic (arXiv:2212.04089)"
    Params = LinearParams
    params: LinearParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The concatenation in linear spaces; in ``factors`` the product of the summed factors, over Σ w."""
        if coordinates.is_linear:
            return concatenate(coordinates.updates, self.target_weights(context.weights, context.total_weight))
        product = super().merge(coordinates, context)
        return product.scaled(1 / context.total_weight) if self.params.normalize else product

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        """Σ_t w_t x_t."""
        return (block * weights).sum(dim=0)

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """w_t, over Σ w where normalised."""
        if not self.params.normalize:
            return tuple(weights)
        return tuple(w / total_weight for w in weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse to normalise by a sum of weights that is zero."""
        if self.params.normalize and abs(total_weight) < NEGLIGIBLE_TOTAL:
            raise StrategyError(
                f"the weights {list(weights)} sum to {total_weight:g}, which cannot normalise an average; "
                "set parameters.normalize: false for the plain sum Σ w·ΔW (task arithmetic)"
            )

    def returns_single_input(self) -> bool:
        """Always."""
        return True

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """What the space holds, and the concatenation."""
        if space.name == "delta":  # its coordinates are never read
            return 2 * shape.factor_entries
        return super().working_entries(shape, space) + shape.factor_entries


PRESETS = (
    Preset(
        "task_arithmetic",
        Linear,
        "the plain sum Σ w·ΔW, exact: linear without normalisation (peft's `cat` and `svd`)",
        "Editing models with task arithmetic (arXiv:2212.04089)",
        parameters={"normalize": False},
    ),
)
