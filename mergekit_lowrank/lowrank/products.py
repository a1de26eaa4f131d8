"""Norms, inner products and errors of updates from small Gram products in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.decompositions import gram, in_double, thin_basis
from mergekit_lowrank.lowrank.updates import DenseUpdate, LowRankUpdate, Update, concatenate

__all__ = ["by_pair", "component_products", "distance", "inner", "inner_products", "norm", "overlaps"]

ROW_BLOCK = 1024
"""Rows of a dense delta accumulated at once in float64."""


def _inner_low(x: LowRankUpdate, y: LowRankUpdate) -> float:
    left = in_double(x.b).T @ in_double(y.b)
    right = in_double(x.a) @ in_double(y.a).T
    return float((left * right).sum()) * x.scaling * y.scaling


def _inner_mixed(x: DenseUpdate, y: LowRankUpdate) -> float:
    a = in_double(y.a).T
    blocks = zip(torch.split(x.delta, ROW_BLOCK), torch.split(y.b, ROW_BLOCK), strict=True)
    return sum(float(((in_double(rows) @ a) * in_double(b)).sum()) for rows, b in blocks) * y.scaling


def _inner_dense(x: DenseUpdate, y: DenseUpdate) -> float:
    blocks = zip(torch.split(x.delta, ROW_BLOCK), torch.split(y.delta, ROW_BLOCK), strict=True)
    return sum(float((in_double(p) * in_double(q)).sum()) for p, q in blocks)


def inner(x: Update, y: Update) -> float:
    """Frobenius inner product <x, y> of two deltas. Low-rank pairs cost O(d · r²), mixed pairs read the delta once."""
    match x, y:
        case LowRankUpdate(), LowRankUpdate():
            return _inner_low(x, y)
        case DenseUpdate(), LowRankUpdate():
            return _inner_mixed(x, y)
        case LowRankUpdate(), DenseUpdate():
            return _inner_mixed(y, x)
        case _:
            return _inner_dense(x, y)  # type: ignore[arg-type]


def inner_products(updates: Sequence[LowRankUpdate]) -> Tensor:
    """(n, n) float64, on the CPU: <ΔW_s, ΔW_t> of all pairs, from one Gram matrix of all b and one of all a."""
    return by_pair(component_products(updates), updates)


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


def overlaps(update: Update, others: Sequence[LowRankUpdate]) -> list[float]:
    """<M, ΔW_t> for each of n updates; a dense M is read once."""
    match update:
        case LowRankUpdate():
            left, right = in_double(update.b).T, in_double(update.a)
            found = [((left @ in_double(u.b)) * (right @ in_double(u.a).T)).sum(dim=0) for u in others]
            return (_by_update(torch.cat(found).cpu().unsqueeze(1), others) * update.scaling).flatten().tolist()
        case DenseUpdate():
            return _by_update(_dense_overlaps(update.delta, others).unsqueeze(1), others).flatten().tolist()


def _dense_overlaps(delta: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(R,) on the CPU: bᵢᵀ · M · aᵢᵀ of every component of every update, M read once by blocks of rows."""
    a = in_double(torch.cat([u.a for u in updates])).T
    total = a.new_zeros(a.shape[1])
    for rows, *b in zip(torch.split(delta, ROW_BLOCK), *(torch.split(u.b, ROW_BLOCK) for u in updates), strict=True):
        total += ((in_double(rows) @ a) * in_double(torch.cat(b, dim=1))).sum(dim=0)
    return total.cpu()


def _by_update(components: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(n, …): sums over the components (R, …) of each of n updates, times its scaling."""
    parts = torch.split(components, [u.rank for u in updates])
    return torch.stack([part.sum(dim=0) * u.scaling for part, u in zip(parts, updates, strict=True)])


def norm(update: Update) -> float:
    """Frobenius norm of a delta; exactly zero for a zero factor."""
    return math.sqrt(max(inner(update, update), 0.0))


def distance(update: LowRankUpdate, targets: Sequence[LowRankUpdate], coefficients: Sequence[float]) -> float:
    """‖M − Σ_t c_t ΔW_t‖_F from the core of [M, −Σ], so that nearly equal updates do not cancel."""
    difference = concatenate([update, *targets], [1.0, *(-c for c in coefficients)])
    r_b, r_a = thin_basis(difference.b).factor, thin_basis(difference.a.T).factor
    return float(torch.linalg.matrix_norm(r_b @ r_a.T)) * abs(difference.scaling)
