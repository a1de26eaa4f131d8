"""What every weighted sum has in common: its normalisation, and the weights it refuses."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import Update
from mergekit_lowrank.spaces import Coordinates, Part
from mergekit_lowrank.strategies.base import ElementwiseStrategy, MergeContext, Params, column
from mergekit_lowrank.strategies.stages import weighted_sum

__all__ = ["SumParams", "WeightedSum", "summed"]

NEGLIGIBLE_TOTAL = 1e-8
"""|Σ w| below this cannot normalise an average (mergekit uses the same bound and then silently divides by 1)."""


class SumParams(Params):
    """Parameters of a weighted sum."""

    normalize: bool = Field(
        False, description="divide by the sum of all weights (a weighted average); false is the plain sum Σ w·x"
    )


def summed(part: Part, coefficients: Sequence[float]) -> Tensor:
    """(rows, columns): Σ_t c_t x_t of a part."""
    own = column(coefficients, part)
    return part.merged(lambda block: weighted_sum(block, own))


class WeightedSum(ElementwiseStrategy):
    """A method that adds up weighted entries, and divides by Σ w where normalised."""

    params: SumParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The parts merged and decoded, over Σ w where normalised."""
        merged = super().merge(coordinates, context)
        return merged.scaled(1 / context.total_weight) if self.params.normalize else merged

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
