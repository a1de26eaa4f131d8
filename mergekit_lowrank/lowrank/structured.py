"""Updates that are stored as other products of small matrices, as the factors of a low-rank update: exact, no SVD.

Nothing here looks at a value: ranks follow from shapes alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.updates import READ_ENTRIES, LowRankUpdate, blocks_of_rows

__all__ = ["full_matrix", "hadamard", "kronecker", "tucker", "with_diagonals"]


def full_matrix(matrix: Tensor) -> LowRankUpdate:
    """A matrix (d_out, d_in) as an update of rank min(d_out, d_in): its own factor, an identity on the smaller side."""
    d_out, d_in = matrix.shape
    identity = torch.eye(min(d_out, d_in), dtype=matrix.dtype, device=matrix.device)
    return LowRankUpdate(identity, matrix) if d_out < d_in else LowRankUpdate(matrix, identity)


def hadamard(one: LowRankUpdate, other: LowRankUpdate) -> LowRankUpdate:
    """The entry-wise product of two updates, of rank min(r1 · r2, d_out, d_in).

    Column (i, j) of b is the entry-wise product of column i of b1 and column j of b2, and so with the rows of a: the
    face-splitting and the Khatri-Rao product. Where these would be wider than the delta, it is multiplied out instead.

    Args:
        one: (d_out, d_in).
        other: of the same shape.

    Source: Slyusar 1999, "A family of face products of matrices and its properties"; of LoHa: FedPara (Hyeon-Woo et
        al. 2022, arXiv:2108.06098), proposition 1.
    """
    scaling = one.scaling * other.scaling
    if one.rank * other.rank > min(one.shape):
        return full_matrix(_product_of_deltas(one, other)).scaled(scaling)
    b = (one.b.unsqueeze(2) * other.b.unsqueeze(1)).flatten(1)
    a = (one.a.unsqueeze(1) * other.a.unsqueeze(0)).flatten(0, 1)
    return LowRankUpdate(b, a, scaling)


def _product_of_deltas(one: LowRankUpdate, other: LowRankUpdate) -> Tensor:
    """The entry-wise product of two deltas, their scalings left out; one matrix of their size is held, not two."""
    delta = one.b @ one.a
    for where in blocks_of_rows(other.shape, READ_ENTRIES):
        delta[where] *= other.b[where] @ other.a
    return delta


def kronecker(one: LowRankUpdate | Tensor, other: LowRankUpdate | Tensor) -> LowRankUpdate:
    """The Kronecker product of two matrices, of which each may be low-rank, as (b1 ⊗ b2)(a1 ⊗ a2).

    Its rank is the product of both ranks: of a full matrix (m, n) min(m, n), of a low-rank one at most that.

    Args:
        one: (m1, n1).
        other: (m2, n2).

    Returns:
        (m1 · m2, n1 · n2).

    Source: Van Loan 2000, "The ubiquitous Kronecker product", the mixed-product property.
    """
    left, right = _narrow(one), _narrow(other)
    return LowRankUpdate(_kron(left.b, right.b), _kron(left.a, right.a), left.scaling * right.scaling)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """As ``torch.kron``, which fails on some views (PyTorch 2.13)."""
    return (left[:, None, :, None] * right[None, :, None, :]).flatten(2).flatten(0, 1)


def _narrow(matrix: LowRankUpdate | Tensor) -> LowRankUpdate:
    """Of rank min(m, n) at most: wider factors are multiplied out."""
    if isinstance(matrix, Tensor):
        return full_matrix(matrix)
    if matrix.rank > min(matrix.shape):
        return full_matrix(matrix.b @ matrix.a).scaled(matrix.scaling)
    return matrix


def tucker(core: Tensor, out: Tensor, into: Tensor) -> LowRankUpdate:
    """A Tucker-2 kernel, seen as a matrix (d_out, channels · k), of rank r_out: exact, as only two modes are factored.

    Args:
        core: (r_out, r_in, *kernel).
        out: (r_out, d_out).
        into: (r_in, channels).

    Source: FedPara (arXiv:2108.06098), proposition 3; LyCORIS (Yeh et al. 2024, arXiv:2309.14859).
    """
    return LowRankUpdate(out.T, torch.einsum("ij...,jc->ic...", core, into).flatten(1))


def with_diagonals(update: LowRankUpdate, middle: Tensor, rows: Tensor | None = None) -> LowRankUpdate:
    """diag(rows) · b · diag(middle) · a, of the same rank and scaling.

    Args:
        update: of rank r.
        middle: (r,), multiplied into the rows of a.
        rows: (d_out,), multiplied into the rows of b.

    Source: VeRA (Kopiczko et al. 2024, arXiv:2310.11454), equation 2; AdaLoRA (Zhang et al. 2023, arXiv:2303.10512),
        equation 3.
    """
    b = update.b if rows is None else rows.unsqueeze(1) * update.b
    return replace(update, b=b, a=middle.unsqueeze(1) * update.a)
