"""How large the merged update is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lowrank.lowrank import InputUpdate, Update, overlaps_and_energies

__all__ = ["AutoScale", "FixedScale", "RetentionScale", "ScalePolicy", "Scaling", "retained"]

PLAUSIBLE = (0.1, 10.0)
"""Factors outside are not trusted, except that the upper bound is N where that is larger: results that oppose their
inputs, or are nearly orthogonal to them, make retention meaningless."""
AUTO_EXPONENT = -0.4
"""``auto`` keeps N^-0.4 of the inputs: within about half a point of the coefficient tuned on validation data on the
bundled real tasks, for every method tried there (docs/explanation/scale-policy.md)."""


@dataclass(frozen=True)
class Scaling:
    """The factor a policy decided on.

    Attributes:
        factor: what the merged update is multiplied by.
        warning: why the policy fell back to 1; None when it did not.
    """

    factor: float
    warning: str | None = None


def retained(overlaps: Sequence[float], energies: Sequence[float], weights: Sequence[float]) -> float | None:
    """Σ_t w_t <M, ΔW_t> / Σ_t |w_t| <ΔW_t, ΔW_t>: the share of the inputs that survives in M; None for zero inputs.

    Args:
        overlaps: <M, ΔW_t> of n inputs.
        energies: <ΔW_t, ΔW_t>.
        weights: w_t.
    """
    whole = sum(abs(w) * energy for energy, w in zip(energies, weights, strict=True))
    return sum(w * o for o, w in zip(overlaps, weights, strict=True)) / whole if whole > 0 else None


class ScalePolicy(ABC):
    """Decides the factor of one module's merged update, before it is cut to a rank."""

    @abstractmethod
    def scaling(self, merged: Update, updates: Sequence[InputUpdate], weights: Sequence[float]) -> Scaling:
        """The factor for ``merged``, made from ``updates`` with ``weights``."""


@dataclass(frozen=True)
class FixedScale(ScalePolicy):
    """A number; 1 is the method's own scale."""

    factor: float = 1.0

    def scaling(self, merged: Update, updates: Sequence[InputUpdate], weights: Sequence[float]) -> Scaling:
        """The number."""
        return Scaling(self.factor)


def _to_retention(target: float, found: float | None, inputs: int) -> Scaling:
    """The factor that makes the retention ``found`` that of the target."""
    if found is None:
        return Scaling(1.0)
    factor = target / found if found else float("inf")
    # An average of N unrelated inputs has retention 1/N: a factor up to N is no sign of opposition.
    highest = max(PLAUSIBLE[1], inputs)
    if PLAUSIBLE[0] <= factor <= highest:
        return Scaling(factor)
    return Scaling(
        1.0,
        f"retention {found:.3g} would need the factor {factor:.3g} to become {target:.3g}, outside "
        f"[{PLAUSIBLE[0]:g}, {highest:g}]; the method's own scale is kept. "
        "Inputs that oppose each other do this, and so do weights far from 1",
    )


@dataclass(frozen=True)
class RetentionScale(ScalePolicy):
    """Scaled so that the share ``target`` of the inputs survives."""

    target: float

    def scaling(self, merged: Update, updates: Sequence[InputUpdate], weights: Sequence[float]) -> Scaling:
        """The factor that gives the retention asked for, or 1 with a warning where that is implausible."""
        overlaps, energies = overlaps_and_energies(merged, updates)
        return _to_retention(self.target, retained(overlaps, energies, weights), len(updates))


@dataclass(frozen=True)
class AutoScale(ScalePolicy):
    """Scaled to retention N^-0.4, N the inputs that take part in the module with a weight and an update."""

    def scaling(self, merged: Update, updates: Sequence[InputUpdate], weights: Sequence[float]) -> Scaling:
        """The factor that gives retention N^-0.4, or 1 with a warning where that is implausible."""
        overlaps, energies = overlaps_and_energies(merged, updates)
        active = sum(1 for energy, w in zip(energies, weights, strict=True) if w and energy > 0)
        target = max(active, 1) ** AUTO_EXPONENT
        return _to_retention(target, retained(overlaps, energies, weights), len(updates))
