"""Norms, inner products and errors of updates from small Gram products in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergekit_lowrank.lowrank.decompositions import in_double, triangular_factor
from mergekit_lowrank.lowrank.updates import DenseUpdate, LowRankUpdate, Update, concatenate

__all__ = ["distance", "inner", "norm"]

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


def norm(update: Update) -> float:
    """Frobenius norm of a delta; exactly zero for a zero factor."""
    return math.sqrt(max(inner(update, update), 0.0))


def distance(update: LowRankUpdate, targets: Sequence[LowRankUpdate], coefficients: Sequence[float]) -> float:
    """‖M − Σ_t c_t ΔW_t‖_F from the core of [M, −Σ], so that nearly equal updates do not cancel."""
    difference = concatenate([update, *targets], [1.0, *(-c for c in coefficients)])
    r_b, r_a = triangular_factor(difference.b), triangular_factor(difference.a.T)
    return float(torch.linalg.matrix_norm(in_double(r_b) @ in_double(r_a).T)) * abs(difference.scaling)
