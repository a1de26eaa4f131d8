"""How a merged update stands to its inputs and to their exact weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.decompositions import in_double
from mergekit_lowrank.lowrank.products import (
    by_pair,
    component_products,
    distance,
    inner_products,
    norm,
    overlaps,
    products_of_rows,
    rows_together,
    weighted,
)
from mergekit_lowrank.lowrank.updates import InputUpdate, LowRankUpdate, Update, are_low_rank

__all__ = ["Comparison", "compare", "cosines_of"]

CANCELLED = 1e-6
"""A weighted sum whose norm is below this share of Σ |c|·‖ΔW‖ has cancelled to rounding: an error relative to it means
nothing."""
DIGITS = {torch.float32: 1e-3, torch.float64: 1e-10}
"""What sums of inner products that cancel keep, as a share of what they cancel from. Products in float32 are good to
about 1e-7 of it, in float64 to 1e-15: so four digits of a norm are right above this share."""
FLOAT32_RANGE = (1e-25, 1e25)
"""Energies that products in float32 neither lose to underflow nor to overflow."""
EXACT_JOINT_RANK = 256
"""Up to this joint rank R the norm of the sum is exact. It takes all pairs of inputs, O(R² · d): more than most merges
cost, beyond. There the error is measured on random inputs."""
ROUNDED = 1e-5
"""The same as ``CANCELLED`` for outputs in float32."""
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
        cosines: (n, n) of ΔW_s and ΔW_t, None where one is zero; empty where the joint rank is above 256.
        relative_error: ‖M − Σ c ΔW‖ / ‖Σ c ΔW‖; None where the sum is zero or has cancelled.
        is_estimate: whether the error is that of the outputs for random inputs, ‖(M − Σ)·X‖ / ‖Σ·X‖, X Gaussian.
    """

    norm: float
    norms: tuple[float, ...]
    overlaps: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    relative_error: float | None
    is_estimate: bool


def compare(
    merged: Update, updates: Sequence[InputUpdate], coefficients: Sequence[float], generator: torch.Generator
) -> Comparison:
    """Norms, overlaps and the error of M against Σ c_t ΔW_t.

    From products of factors; where M or an input is dense, from one pass over the rows of all, which is always exact.

    Args:
        merged: M.
        updates: ΔW_t, all of one type.
        coefficients: c_t.
        generator: on the CPU; draws the random inputs where the joint rank is above 256.
    """
    if not (isinstance(merged, LowRankUpdate) and are_low_rank(updates)):
        return _compared_by_rows(merged, updates, coefficients)
    if sum(u.rank for u in updates) > EXACT_JOINT_RANK:
        norms = tuple(norm(u) for u in updates)
        error = _probed_error(merged, updates, coefficients, norms, generator)
        return Comparison(norm(merged), norms, tuple(overlaps(merged, updates)), (), error, is_estimate=True)
    table = _table(merged, updates, coefficients)
    return _from_table(table, _exact_error(table, merged, updates, coefficients))


def _from_table(table: Tensor, error: float | None) -> Comparison:
    """What the inner products (1 + n, 1 + n) of M and all ΔW say, beside the error."""
    whole, *norms = table.diagonal().clamp(min=0).sqrt().tolist()
    cosines = cosines_of(table[1:, 1:])
    return Comparison(whole, tuple(norms), tuple(table[0, 1:].tolist()), cosines, error, is_estimate=False)


def cosines_of(products: Tensor) -> tuple[tuple[float | None, ...], ...]:
    """(n, n): cosines from the inner products (n, n) of n updates; None where one of the two is zero."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    cosines = (products / lengths.unsqueeze(1) / lengths).clamp(-1, 1)
    return tuple(tuple(None if math.isnan(c) else c for c in row) for row in cosines.tolist())


def _compared_by_rows(merged: Update, updates: Sequence[InputUpdate], coefficients: Sequence[float]) -> Comparison:
    everything = [merged, *updates]
    table = torch.zeros(len(everything), len(everything), dtype=torch.float64)
    missed = wanted = 0.0
    for block in rows_together(everything):
        table += products_of_rows(block).cpu()
        target = weighted(block[1:], coefficients)
        wanted += float(target.square().sum())
        missed += float(target.sub_(block[0]).square_().sum())
    size = _size(table, coefficients)
    return _from_table(table, None if math.sqrt(wanted) <= CANCELLED * size else math.sqrt(missed / wanted))


def _size(table: Tensor, coefficients: Sequence[float]) -> float:
    """Σ |c_t|·‖ΔW_t‖: what the norm of the weighted sum cannot exceed."""
    lengths = table.diagonal()[1:].clamp(min=0).sqrt()
    return float(lengths @ torch.tensor(coefficients, dtype=lengths.dtype).abs())


def _table(merged: LowRankUpdate, updates: Sequence[LowRankUpdate], coefficients: Sequence[float]) -> Tensor:
    """(1 + n, 1 + n): inner products of M and all ΔW; from products in float32 where these keep their digits."""
    everything = [merged, *updates]
    if merged.dtype == torch.float32:
        components = component_products(everything, torch.float32)
        table, sizes = (by_pair(c, everything) for c in (components, components.abs()))
        energies, c = table.diagonal(), torch.tensor([0.0, *coefficients], dtype=torch.float64)
        in_range = (energies > FLOAT32_RANGE[0]) & (energies < FLOAT32_RANGE[1])
        distinct = energies > DIGITS[torch.float32] * sizes.diagonal().abs()
        if bool((in_range & distinct).all()) and _keeps_digits(table, c, torch.float32):
            return table
    return inner_products(everything)


def _keeps_digits(table: Tensor, coefficients: Tensor, dtype: torch.dtype) -> bool:
    """Whether ‖Σ c ΔW‖² is not lost in what it is a difference of."""
    size = float((coefficients.abs() * table.diagonal().clamp(min=0).sqrt()).sum())
    return float(coefficients @ table @ coefficients) > DIGITS[dtype] * size * size


def _exact_error(
    table: Tensor, merged: LowRankUpdate, updates: Sequence[LowRankUpdate], coefficients: Sequence[float]
) -> float | None:
    c = torch.tensor([1.0, *(-c for c in coefficients)], dtype=torch.float64)
    size = float((c.abs() * table.diagonal().clamp(min=0).sqrt())[1:].sum())
    target = math.sqrt(max(float(c[1:] @ table[1:, 1:] @ c[1:]), 0.0))
    if target <= CANCELLED * size:
        return None
    if _keeps_digits(table, c, merged.dtype):
        return math.sqrt(float(c @ table @ c)) / target
    return distance(merged, updates, coefficients) / target


def _probed_error(
    merged: LowRankUpdate,
    updates: Sequence[LowRankUpdate],
    coefficients: Sequence[float],
    norms: Sequence[float],
    generator: torch.Generator,
) -> float | None:
    probes = torch.randn(merged.shape[1], PROBES, generator=generator).to(merged.b)
    outputs = _outputs(updates, coefficients, probes)
    target = float(torch.linalg.matrix_norm(in_double(outputs)))
    size = sum(abs(c) * own for c, own in zip(coefficients, norms, strict=True))
    if target <= ROUNDED * size * math.sqrt(PROBES):
        return None
    return float(torch.linalg.matrix_norm(in_double(_outputs([merged], [1.0], probes) - outputs))) / target


def _outputs(updates: Sequence[LowRankUpdate], coefficients: Sequence[float], inputs: Tensor) -> Tensor:
    """(d_out, m): Σ_t c_t ΔW_t · inputs (d_in, m)."""
    total = inputs.new_zeros(updates[0].shape[0], inputs.shape[1])
    for update, c in zip(updates, coefficients, strict=True):
        total.addmm_(update.b, update.a @ inputs, alpha=c * update.scaling)
    return total
