"""How a merged update stands to its inputs and to their exact weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.products import distance, inner_products, norm, overlaps
from mergekit_lowrank.lowrank.updates import LowRankUpdate

__all__ = ["Comparison", "compare"]

CANCELLED = 1e-6
"""A weighted sum whose norm is below this share of Σ |c|·‖ΔW‖ has cancelled to rounding: an error relative to it means
nothing."""
DIFFERENCE = 1e-3
"""‖M − Σ‖² from inner products in float32 is good to about 1e-7 of (‖M‖ + Σ ‖c ΔW‖)². Above this share of it four
digits are right; below it, the distance is computed for itself."""
EXACT_JOINT_RANK = 256
"""Up to this joint rank R the norm of the sum is exact. It takes all pairs of inputs, O(R² · d): more than most merges
cost, beyond. There the error is measured on random inputs."""
PROBES = 64
"""Random inputs beyond that joint rank: on trained adapters the estimate is within 2 % of itself on average, 7 % at
worst."""


@dataclass(frozen=True)
class Comparison:
    """A merged update M beside n updates ΔW_t and their weighted sum Σ c_t ΔW_t.

    Attributes:
        norm: ‖M‖_F.
        norms: ‖ΔW_t‖_F.
        overlaps: <M, ΔW_t>.
        relative_error: ‖M − Σ c ΔW‖ / ‖Σ c ΔW‖; None where the sum is zero or has cancelled.
        is_estimate: whether the error is that of the outputs for random inputs, ‖(M − Σ)·X‖ / ‖Σ·X‖, X Gaussian.
    """

    norm: float
    norms: tuple[float, ...]
    overlaps: tuple[float, ...]
    relative_error: float | None
    is_estimate: bool


def compare(
    merged: LowRankUpdate, updates: Sequence[LowRankUpdate], coefficients: Sequence[float], generator: torch.Generator
) -> Comparison:
    """Norms, overlaps and the error of M against Σ c_t ΔW_t.

    Args:
        merged: M.
        updates: ΔW_t, all of one type.
        coefficients: c_t.
        generator: on the CPU; draws the random inputs where the joint rank is above 256.
    """
    if sum(u.rank for u in updates) > EXACT_JOINT_RANK:
        norms = tuple(norm(u) for u in updates)
        error = _probed_error(merged, updates, coefficients, norms, generator)
        return Comparison(norm(merged), norms, tuple(overlaps(merged, updates)), error, is_estimate=True)
    table = inner_products([merged, *updates], merged.dtype)
    whole, *norms_ = table.diagonal().clamp(min=0).sqrt().tolist()
    error = _exact_error(table, merged, updates, coefficients)
    return Comparison(whole, tuple(norms_), tuple(table[0, 1:].tolist()), error, is_estimate=False)


def _exact_error(
    table: Tensor, merged: LowRankUpdate, updates: Sequence[LowRankUpdate], coefficients: Sequence[float]
) -> float | None:
    c = torch.tensor([1.0, *(-c for c in coefficients)], dtype=torch.float64)
    sizes = c.abs() * table.diagonal().clamp(min=0).sqrt()
    target = math.sqrt(max(float(c[1:] @ table[1:, 1:] @ c[1:]), 0.0))
    if target <= CANCELLED * float(sizes[1:].sum()):
        return None
    squared = float(c @ table @ c)
    if squared <= DIFFERENCE * float(sizes.sum()) ** 2:  # the digits of a difference of squares are gone
        return distance(merged, updates, coefficients) / target
    return math.sqrt(squared) / target


def _probed_error(
    merged: LowRankUpdate,
    updates: Sequence[LowRankUpdate],
    coefficients: Sequence[float],
    norms: Sequence[float],
    generator: torch.Generator,
) -> float | None:
    probes = torch.randn(merged.shape[1], PROBES, generator=generator).to(merged.b)
    outputs = _outputs(updates, coefficients, probes)
    target = float(torch.linalg.matrix_norm(outputs))
    size = sum(abs(c) * own for c, own in zip(coefficients, norms, strict=True))
    if target <= CANCELLED * size * math.sqrt(PROBES):
        return None
    return float(torch.linalg.matrix_norm(_outputs([merged], [1.0], probes) - outputs)) / target


def _outputs(updates: Sequence[LowRankUpdate], coefficients: Sequence[float], inputs: Tensor) -> Tensor:
    """(d_out, m): Σ_t c_t ΔW_t · inputs (d_in, m)."""
    total = inputs.new_zeros(updates[0].shape[0], inputs.shape[1])
    for update, c in zip(updates, coefficients, strict=True):
        total.addmm_(update.b, update.a @ inputs, alpha=c * update.scaling)
    return total
