"""The joint decomposition of updates that are dense: passes over blocks, and one Gram matrix of the smaller side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import drivers, scratch
from mergekit_lowrank.lowrank.decompositions import in_double, left_signs, where_it_pays
from mergekit_lowrank.lowrank.updates import InputUpdate, blocks_of_rows

__all__ = ["GRAM_BLOCK_ENTRIES", "DenseJointDecomposition", "dense_joint_decomposition"]

GRAM_BLOCK_ENTRIES = 1 << 20
"""Entries that are in float64 at once, beside their product (8 MiB): wide enough for matrix products to run at full
speed, fixed, so that sums do not change."""
TRIANGLE_STEP = 512
"""Rows of the Gram matrix that are added to at once; what is left out above its diagonal saves up to half the work."""
NOISE_FLOOR = 1e-12
"""As a share of σ_max: an update's part in a joint direction at or below this is rounding of the Gram matrix, and is
made zero."""


@dataclass(frozen=True, eq=False)
class DenseJointDecomposition:
    """[ΔW_1 … ΔW_N] = U · diag(S) · [V_1ᵀ … V_Nᵀ], the right blocks held.

    Attributes:
        left: U, (d_out, k), orthonormal columns.
        singular_values: S, (k,), above zero, descending but for those at the level of rounding.
        coordinates: (N, k, d_in), diag(S) · V_tᵀ; zero where an update has no part in a direction but rounding.
        sizes: (N, k), their rows' lengths.
    """

    left: Tensor
    singular_values: Tensor
    coordinates: Tensor
    sizes: Tensor

    def right_norms(self) -> Tensor:
        """(N, k): ‖row i of V_tᵀ‖₂."""
        norms: Tensor = self.sizes / self.singular_values
        return norms


def dense_joint_decomposition(
    updates: Sequence[InputUpdate], rank_tolerance: float, *, vertical: bool = False
) -> DenseJointDecomposition:
    """The thin SVD of the updates side by side, of the transposed ones where ``vertical``, any of them dense.

    Each update is read once, into one stack (``lowrank.empty``). The Gram matrix of its smaller side is accumulated and
    diagonalised in float64. From that of the rows, d_out ≤ N · d_in, comes U, and Uᵀ · ΔW_t replaces the stack block by
    block; from that of the columns V, and U = [ΔW_1 … ΔW_N] · V · S⁻¹.

    Args:
        updates: of one module.
        rank_tolerance: singular values not above this share of the largest are cut, and with the Gram matrix of the
            columns those below its resolution, √(d · ε₆₄) · σ_max.
        vertical: whether the updates are stacked on top of each other, which is the same for the transposed ones.

    Source: DRM (arXiv:2505.23117) takes the same SVD of the dense concatenation. In float32 the Gram matrix would cost
    up to 9 % where singular values are close to each other.
    """
    stack = _stacked(updates)
    oriented = stack.mT if vertical else stack
    inputs, rows, columns = oriented.shape
    found = _by_rows(oriented, rank_tolerance) if rows <= inputs * columns else _by_columns(oriented, rank_tolerance)
    return _cut(found, rank_tolerance)


def _stacked(updates: Sequence[InputUpdate]) -> Tensor:
    """(N, d_out, d_in): the deltas."""
    first = updates[0]
    stack = scratch.empty((len(updates), *first.shape), first.dtype, first.device)
    for target, update in zip(stack, updates, strict=True):
        for where in blocks_of_rows(first.shape, GRAM_BLOCK_ENTRIES):
            target[where] = update.rows(where)
    return stack


def _by_rows(stack: Tensor, rank_tolerance: float) -> DenseJointDecomposition:
    """From Σ_t ΔW_t · ΔW_tᵀ, whose eigenvectors are U; the coordinates overwrite the stack."""
    products = in_double(stack.new_zeros(stack.shape[1], stack.shape[1]))
    for block in _columns(stack):
        _add_products(products, in_double(block))
    values, vectors = _eigh(products)
    del products
    kept = _above(values, rank_tolerance)
    vectors = vectors[:, len(values) - kept :]
    vectors *= left_signs(vectors)
    sizes = in_double(stack.new_zeros(stack.shape[0], kept))
    for own, squares in zip(stack, sizes, strict=True):
        for block in _columns(own.unsqueeze(0)):
            turned = (vectors.T @ in_double(block)).flip(0)
            squares += turned.square().sum(dim=1)
            block[:kept] = turned.to(block)
    return DenseJointDecomposition(
        _descending(vectors, stack), values.flip(0)[:kept].clamp(min=0).sqrt(), stack[:, :kept], sizes.sqrt()
    )


def _by_columns(stack: Tensor, rank_tolerance: float) -> DenseJointDecomposition:
    """From the inner products of all columns, whose eigenvectors are V."""
    inputs, rows, columns = stack.shape
    products = in_double(stack.new_zeros(inputs * columns, inputs * columns))
    blocks = blocks_of_rows((rows, inputs * columns), GRAM_BLOCK_ENTRIES)
    for where in blocks:
        _add_products(products, _side_by_side(stack, where).T)
    values, vectors = _eigh(products)
    del products
    kept = _above(values, max(rank_tolerance, math.sqrt(inputs * columns * torch.finfo(values.dtype).eps)))
    values, vectors = values.flip(0)[:kept].sqrt(), vectors[:, len(values) - kept :].flip(1)
    normalised = vectors / values
    left = scratch.empty((rows, kept), stack.dtype, stack.device)
    for where in blocks:
        left[where] = (_side_by_side(stack, where) @ normalised).to(left)
    signs = left_signs(left)
    left *= signs
    vectors *= signs.to(values) * values
    right = vectors.T.view(kept, inputs, columns).transpose(0, 1)
    coordinates = scratch.empty((inputs, kept, columns), stack.dtype, stack.device).copy_(right)
    return DenseJointDecomposition(left, values, coordinates, torch.linalg.vector_norm(right, dim=2))


def _columns(stack: Tensor) -> Iterator[Tensor]:
    """All columns of N matrices (N, rows, columns), in blocks (rows, width): views, in the order they lie in."""
    slices = blocks_of_rows((stack.shape[2], stack.shape[1]), GRAM_BLOCK_ENTRIES)
    return (own[:, where] for own in stack for where in slices)


def _side_by_side(stack: Tensor, where: slice) -> Tensor:
    """(rows, N · columns): rows of N matrices, in float64."""
    return in_double(stack[:, where].transpose(0, 1).flatten(1))


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the inner products of all rows to the lower triangle of ``total`` and, in squares along it, above."""
    for start in range(0, rows.shape[0], TRIANGLE_STEP):
        end = start + TRIANGLE_STEP
        total[start:end, :end].addmm_(rows[start:end], rows[:end].T)


def _eigh(products: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, from the lower triangle; on the device that holds the matrix."""
    values, vectors = drivers.eigh(where_it_pays(products))
    return values.to(products.device), vectors.to(products.device)


def _above(values: Tensor, tolerance: float) -> int:
    """How many of the squared singular values, in any order, are above a share of the largest."""
    singular = values.clamp(min=0).sqrt()
    return int((singular > tolerance * singular.max()).sum())


def _descending(vectors: Tensor, like: Tensor) -> Tensor:
    """The columns in reverse order, in the type of ``like``."""
    left = scratch.empty((vectors.shape[0], vectors.shape[1]), like.dtype, like.device)
    for where in blocks_of_rows((vectors.shape[0], vectors.shape[1]), GRAM_BLOCK_ENTRIES):
        left[where] = vectors[where].flip(1).to(like)
    return left


def _cut(found: DenseJointDecomposition, rank_tolerance: float) -> DenseJointDecomposition:
    """Without parts that are rounding; the singular values are what is left, the last of them above the tolerance."""
    real = found.sizes > NOISE_FLOOR * found.singular_values[:1]
    for own, own_real in zip(found.coordinates, real, strict=True):
        own[~own_real.to(own.device)] = 0
    sizes = found.sizes * real
    values = torch.linalg.vector_norm(sizes, dim=0)
    last = (values > rank_tolerance * values.max()).nonzero() if values.numel() else values
    kept = int(last[-1]) + 1 if last.numel() else 0
    return DenseJointDecomposition(
        found.left[:, :kept],
        values[:kept].clamp(min=torch.finfo(found.left.dtype).tiny).to(found.left),
        found.coordinates[:, :kept],
        sizes[:, :kept].to(found.left),
    )
