"""The coordinate-wise median as a merge method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_lowrank import ElementwiseStrategy, MergeContext, StrategyError, hookimpl


class Median(ElementwiseStrategy):
    """For each entry the median of the inputs; of an even number of them the mean of the middle two."""

    name = "median"
    summary = "the median of each entry over the inputs, which one input that is far off hardly moves"
    paper = "Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498)"
    spaces = ("core", "joint", "delta", "factors")  # every space is fine; the first is the default

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        """The middle of the weighted entries (Tensor.median would give the lower one of two)."""
        ordered = (block * weights).sort(dim=0).values
        middle = len(ordered) // 2
        return (ordered[-middle - 1] + ordered[middle]) / 2

    def returns_single_input(self) -> bool:
        """Always."""
        return True

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """Those of the average, which the report compares the median with."""
        return tuple(weight / len(weights) for weight in weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse weights that differ: a median has no use for them."""
        if len(set(weights)) > 1:
            raise StrategyError(
                f"a median counts every input alike, and the weights are {list(weights)}; "
                "give all of them the same weight, or use linear"
            )


@hookimpl
def strategies() -> list[type[Median]]:
    """The median."""
    return [Median]
