"""What the methods built on an average share: weights are relative to their sum."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lowrank import Strategy, StrategyError

__all__ = ["AveragingStrategy"]

NEGLIGIBLE_TOTAL = 1e-8
"""|Σ w| below this cannot normalise an average; the bound of ``linear``."""


class AveragingStrategy(Strategy):
    """A method whose result is near Σ w_t ΔW_t / Σ w; an input that lacks a module counts in Σ w, as in ``linear``."""

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """w_t / Σ w."""
        return tuple(w / total_weight for w in weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse weights that sum to zero: they have no average."""
        if abs(total_weight) < NEGLIGIBLE_TOTAL:
            raise StrategyError(
                f"the weights {list(weights)} sum to {total_weight:g}, and '{self.name}' divides by their sum; "
                "give weights of another sum, or use a method without an average, such as tsv"
            )
