"""Norms, inner products and errors of updates from small Gram products in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.decompositions import gram, in_double, thin_basis
from mergekit_lowrank.lowrank.updates import (
    DenseUpdate,
    InputUpdate,
    LowRankUpdate,
    StreamedUpdate,
    Update,
    are_low_rank,
    blocks_of_rows,
    concatenate,
)

__all__ = [
    "by_pair",
    "component_products",
    "distance",
    "inner",
    "inner_products",
    "norm",
    "overlaps",
    "overlaps_and_energies",
    "products_of_rows",
    "rows_together",
    "weighted",
]

STREAM_ENTRIES = 1 << 19
"""Entries of dense deltas, over all that are read together, that are in float64 at once (4 MiB)."""


def _inner_low(x: LowRankUpdate, y: LowRankUpdate) -> float:
    left = in_double(x.b).T @ in_double(y.b)
    right = in_double(x.a) @ in_double(y.a).T
    return float((left * right).sum()) * x.scaling * y.scaling


def rows_together(updates: Sequence[Update]) -> Iterator[Tensor]:
    """The rows of n deltas of one module in float64, in order: blocks (n, rows, d_in)."""
    d_out, d_in = updates[0].shape
    for where in blocks_of_rows((d_out, len(updates) * d_in), STREAM_ENTRIES):
        yield torch.stack([in_double(update.rows(where)) for update in updates])


def products_of_rows(block: Tensor) -> Tensor:
    """(n, n): the inner products of n matrices (n, rows, columns)."""
    flat = block.flatten(1)
    return flat @ flat.T


def inner(x: Update, y: Update) -> float:
    """Frobenius inner product <x, y> of two deltas. Low-rank pairs cost O(d · r²), others read each delta once."""
    match x, y:
        case LowRankUpdate(), LowRankUpdate():
            return _inner_low(x, y)
        case _, LowRankUpdate():
            return overlaps(x, [y])[0]
        case LowRankUpdate(), _:
            return overlaps(y, [x])[0]
        case _:
            return float(sum((block[0] * block[-1]).sum() for block in rows_together([x] if x is y else [x, y])))


def inner_products(updates: Sequence[Update]) -> Tensor:
    """(n, n) float64, on the CPU: <ΔW_s, ΔW_t> of all pairs.

    From one Gram matrix of all b and one of all a; where any is dense, from one pass over the rows of all.
    """
    if are_low_rank(updates):
        return by_pair(component_products(updates), updates)
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for block in rows_together(updates):
        total += products_of_rows(block).cpu()
    return total


def component_products(updates: Sequence[LowRankUpdate], dtype: torch.dtype = torch.float64) -> Tensor:
    """(R, R) float64, on the CPU: (b_iᵀ b_j)·(a_i a_jᵀ) of all pairs of components of n updates, R = Σ r_t.

    Args:
        updates: of one shape.
        dtype: of the products within a block, as in ``gram``.
    """
    b, a = torch.cat([u.b for u in updates], dim=1).T, torch.cat([u.a for u in updates])
    return (gram(b, dtype) * gram(a, dtype)).cpu()


def by_pair(components: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(n, n): sums over the components (R, R) of each pair of n updates, times their scalings."""
    return _by_update(_by_update(components, updates).T, updates)


def overlaps(update: Update, others: Sequence[InputUpdate]) -> list[float]:
    """<M, ΔW_t> for each of n updates; what is dense is read once."""
    if not are_low_rank(others):
        return inner_products([update, *others])[0, 1:].tolist()
    if not isinstance(update, LowRankUpdate):
        return _by_update(_dense_overlaps(update, others).unsqueeze(1), others).flatten().tolist()
    left, right = in_double(update.b).T, in_double(update.a)
    found = [((left @ in_double(u.b)) * (right @ in_double(u.a).T)).sum(dim=0) for u in others]
    return (_by_update(torch.cat(found).cpu().unsqueeze(1), others) * update.scaling).flatten().tolist()


def _dense_overlaps(dense: DenseUpdate | StreamedUpdate, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(R,) on the CPU: bᵢᵀ · M · aᵢᵀ of every component of every update, M read once by blocks of rows."""
    a = in_double(torch.cat([u.a for u in updates])).T
    total = a.new_zeros(a.shape[1])
    for where in blocks_of_rows(dense.shape, STREAM_ENTRIES):
        b = in_double(torch.cat([u.b[where] for u in updates], dim=1))
        total += ((in_double(dense.rows(where)) @ a) * b).sum(dim=0)
    return total.cpu()


def _by_update(components: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(n, …): sums over the components (R, …) of each of n updates, times its scaling."""
    parts = torch.split(components, [u.rank for u in updates])
    return torch.stack([part.sum(dim=0) * u.scaling for part, u in zip(parts, updates, strict=True)])


def norm(update: Update) -> float:
    """Frobenius norm of a delta; exactly zero for a zero factor."""
    return math.sqrt(max(inner(update, update), 0.0))


def overlaps_and_energies(update: Update, others: Sequence[InputUpdate]) -> tuple[list[float], list[float]]:
    """<M, ΔW_t> and <ΔW_t, ΔW_t> for each of n updates; what is dense is read once."""
    if are_low_rank(others):
        return overlaps(update, others), [inner(u, u) for u in others]
    table = inner_products([update, *others])
    return table[0, 1:].tolist(), table.diagonal()[1:].tolist()


def distance(update: Update, targets: Sequence[InputUpdate], coefficients: Sequence[float]) -> float:
    """‖M − Σ_t c_t ΔW_t‖_F, so that nearly equal updates do not cancel: from the core of [M, −Σ], or row by row."""
    if not (isinstance(update, LowRankUpdate) and are_low_rank(targets)):
        everything, c = [update, *targets], [1.0, *(-c for c in coefficients)]
        return math.sqrt(sum(float(weighted(block, c).square().sum()) for block in rows_together(everything)))
    difference = concatenate([update, *targets], [1.0, *(-c for c in coefficients)])
    r_b, r_a = thin_basis(difference.b).factor, thin_basis(difference.a.T).factor
    return float(torch.linalg.matrix_norm(r_b @ r_a.T)) * abs(difference.scaling)


def weighted(block: Tensor, coefficients: Sequence[float]) -> Tensor:
    """(rows, columns): Σ_t c_t x_t of a block (n, rows, columns)."""
    total: Tensor = torch.tensordot(block.new_tensor(coefficients), block, dims=1)
    return total
