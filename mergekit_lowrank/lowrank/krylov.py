"""The leading singular directions of a large matrix, from a few products with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.lowrank import drivers
from mergekit_lowrank.lowrank.decompositions import in_double, svd, thin_qr

__all__ = ["frobenius_energy", "krylov_space"]

OVERSAMPLING = 16
"""Columns beyond the rank asked for, at least (Halko, Martinsson & Tropp 2011, section 4.3, ask 5-10)."""
WIDTH_STEP = 16
"""Blocks are multiples of it: a product with 24 columns takes as long as one with 32."""
ENERGY_SHORTFALL = 5e-4
"""The space has grown enough when it is expected to gain no more than this share of the captured energy: half of what
is promised, since the expectation is up to twice too low (measured on flat, decaying and merged spectra)."""
MAXIMUM_BLOCKS = 24
"""Pure noise, the flattest spectrum, takes half of them."""
EXHAUSTED = 16.0
"""In units of ε · ‖block‖_F: new directions at or below this are rounding of the projection."""
ROW_BLOCK = 64
"""Rows that a transposed product accumulates at once on the CPU: two to three times faster than the whole."""


def frobenius_energy(matrix: Tensor) -> float:
    """‖matrix‖²_F, from sums over 64 rows in the type of the matrix, added in float64: good to 1e-6 in float32."""
    rows = (block.reshape(-1) for block in torch.split(_by_rows(matrix), ROW_BLOCK))
    return float(in_double(torch.stack([torch.dot(entries, entries) for entries in rows])).sum())


def krylov_space(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q (m, K) of a block Krylov space and its images matrixᵀ · Q (n, K): matrix ≈ Q · imagesᵀ.

    Block k is the image of block k − 1 under matrix · matrixᵀ, orthogonal to all before it. A flat spectrum needs far
    fewer blocks than subspace iteration, which keeps the last one only. The space grows until it is expected to gain
    no more than 5e-4 of the energy of its leading ``rank`` directions, or holds the whole range of the matrix.

    Args:
        matrix: (m, n), m ≤ n for the least work.
        rank: how many leading directions are wanted, at most m.
        generator: on the CPU; the start of the space.

    Source: Musco & Musco 2015 (arXiv:1504.05477), algorithm 2.
    """
    width = min(-(-(rank + OVERSAMPLING) // WIDTH_STEP) * WIDTH_STEP, matrix.shape[0])
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32).to(matrix)
    block, _ = thin_qr(_product(matrix, start))
    basis, images = [block], [_product(matrix.T, block)]
    inner_products = _bordered(torch.zeros(0, 0, dtype=torch.float64), images)
    captured = [_leading(inner_products, rank)]
    while not _is_settled(captured) and len(basis) < MAXIMUM_BLOCKS:
        block = _new_directions(_product(matrix, thin_qr(images[-1])[0]), basis)
        if block.shape[1] == 0:
            break
        basis.append(block)
        images.append(_product(matrix.T, block))
        inner_products = _bordered(inner_products, images)
        captured.append(_leading(inner_products, rank))
    return torch.cat(basis, dim=1), torch.cat(images, dim=1)


def _by_rows(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever lies row by row."""
    return matrix if matrix.stride(1) <= matrix.stride(0) else matrix.T


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """The matrix times ``columns``. On the CPU one that lies column by column is read in blocks of columns."""
    if matrix.device.type != "cpu" or _by_rows(matrix) is matrix:
        return matrix @ columns
    total = columns.new_zeros(matrix.shape[0], columns.shape[1])
    for rows, own in zip(torch.split(matrix.T, ROW_BLOCK), torch.split(columns, ROW_BLOCK), strict=True):
        total.addmm_(rows.T, own)
    return total


def _new_directions(block: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of the part of ``block`` that ``basis`` lacks; projected twice, which is enough.

    Directions at the level of rounding are left out: normalised, they would repeat the basis.
    """
    room = block.shape[0] - sum(directions.shape[1] for directions in basis)
    floor = EXHAUSTED * torch.finfo(block.dtype).eps * float(torch.linalg.matrix_norm(block))
    q, r = thin_qr(_projected(block, basis))
    u, s, _ = svd(r)
    kept = min(int((s > floor).sum()), room)
    return thin_qr(_projected(q @ u[:, :kept], basis))[0]


def _projected(block: Tensor, basis: Sequence[Tensor]) -> Tensor:
    for directions in basis:
        block = block - directions @ (directions.T @ block)
    return block


def _bordered(inner_products: Tensor, images: Sequence[Tensor]) -> Tensor:
    """(K, K) float64 on the CPU: those of all images, from those of all but the last; the lower triangle only."""
    rows = torch.cat([images[-1].T @ image for image in images], dim=1).cpu().double()
    return torch.cat([pad(inner_products, (0, rows.shape[0])), rows])


def _leading(inner_products: Tensor, rank: int) -> float:
    """The energy that the space captures in ``rank`` directions."""
    return float(drivers.eigvalsh(inner_products)[-rank:].sum())


def _is_settled(captured: Sequence[float]) -> bool:
    """Whether gains that keep shrinking as the last two did add up to no more than ``ENERGY_SHORTFALL``."""
    if len(captured) < 2:
        return False
    before, previous, last = [0.0, *captured][-3:]
    former, gain = previous - before, last - previous
    return gain <= 0 or (gain < former and gain * gain / (former - gain) <= ENERGY_SHORTFALL * last)
