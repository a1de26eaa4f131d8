"""Thin, joint and core decompositions of stacked low-rank updates, from their factors only.

Every decomposition costs O(d · R²) with R = Σ r_t, never O(d_out · d_in). Singular vectors come in descending order of
their values, and the largest-magnitude entry of each left vector is positive (the first such entry where several tie).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mergekit_lowrank.lowrank import drivers
from mergekit_lowrank.lowrank.updates import LowRankUpdate

__all__ = [
    "JointDecomposition",
    "ThinBasis",
    "fix_signs",
    "gram",
    "in_double",
    "joint_decomposition",
    "left_signs",
    "left_singular_basis",
    "polar_factor",
    "svd",
    "thin_basis",
    "thin_qr",
    "where_it_pays",
]

SMALL_SIDE = 256
"""Matrices up to this size on both sides, such as cores, are decomposed on the CPU: an SVD in float64 takes an H100
4.0, 10 and 29 ms at 128, 256 and 512, one core 3.1, 9.5 and 53, transfers included. MPS has none of its own."""


NOISE_FLOOR = 16.0
"""In units of ε·σ_max: an update's part σ_i·‖V_t,i‖ of a joint direction at or below this is rounding of the joint SVD
(measured on updates that are zero: at most 4, for joint ranks up to 1024), and is made zero. Trims and elections would
take it for entries of the update, and DRM would renormalise it to a unit vector of noise."""


GRAM_COLUMNS = 1024
"""Columns that are converted to float64 at once, few enough for the cache; fixed, so that sums do not change."""

LARGEST_INVERSE = 1e4
"""Columns of unit length whose triangular factor has a larger inverse nearly depend on each other and are left to
Householder's QR: the columns of Q would lose orthogonality, about ‖R⁻¹‖² · ε₆₄ (1e-8 at this size)."""


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU where its device has no float64 (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def thin_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (d, k) with orthonormal columns and R (k, n), matrix = Q · R, k = min(d, n). Rank deficiency is ordinary."""
    if 0 in matrix.shape:
        k = min(matrix.shape)
        return matrix.new_zeros(matrix.shape[0], k), matrix.new_zeros(k, matrix.shape[1])
    q, r = drivers.qr(where_it_pays(matrix))
    return q.to(matrix.device), r.to(matrix.device)


def gram(rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n, n) float64: the inner products of the rows of an (n, d) matrix, summed in float64 over blocks of columns.

    Args:
        rows: the matrix.
        dtype: of the products within a block. float32 takes half the time and errs by up to 1e-6 of the lengths.
    """
    total = in_double(rows.new_zeros(rows.shape[0], rows.shape[0]))
    for block in torch.split(rows, GRAM_COLUMNS, dim=1):
        own = in_double(block) if dtype == torch.float64 else block.to(dtype)
        total += (own @ own.T).to(total.device)
    return total


@dataclass(frozen=True, eq=False)
class ThinBasis:
    """matrix = Q · factor with orthonormal columns Q (d, k), which are applied to what is asked for, not formed.

    Attributes:
        columns: (d, k): Q itself, or the matrix, which is Q · factor.
        factor: (k, n) float64, upper triangular; on the CPU where the device has no float64 (MPS).
        is_formed: whether ``columns`` is Q.
    """

    columns: Tensor
    factor: Tensor
    is_formed: bool

    def times(self, coefficients: Tensor) -> Tensor:
        """(d, m): Q · coefficients, for coefficients (k, m), in the type and on the device of the matrix."""
        if self.is_formed:
            return self.columns @ coefficients.to(self.columns)
        solved = torch.linalg.solve_triangular(self.factor, coefficients.to(self.factor), upper=True).T
        result = self.columns.new_empty(coefficients.shape[1], self.columns.shape[0])
        blocks = torch.split(self.columns.T, GRAM_COLUMNS, dim=1)
        for target, block in zip(torch.split(result, GRAM_COLUMNS, dim=1), blocks, strict=True):
            wide = in_double(block)
            target.copy_(solved.to(wide) @ wide)
        return result.T


def thin_basis(matrix: Tensor) -> ThinBasis:
    """An orthonormal basis of the columns of ``matrix`` (d, n), from their Gram matrix where that is as good as a QR.

    float32 columns have their inner products in float64, and a Cholesky factor of their cosines keeps all their digits
    as long as no column nearly depends on those before it. Columns that do, float64 ones and wide matrices take
    Householder's QR, in float64.

    Source: CholeskyQR; Yamamoto et al. 2015 (ETNA 44), section 3: Q is orthonormal to cond² · ε.
    """
    if matrix.dtype == torch.float32 and 0 < matrix.shape[1] <= matrix.shape[0]:
        factor = _cholesky(gram(matrix.T))
        if factor is not None:
            return ThinBasis(matrix, factor, is_formed=False)
    q, r = thin_qr(in_double(matrix))
    return ThinBasis(q.to(matrix), r, is_formed=True)


def _cholesky(products: Tensor) -> Tensor | None:
    """R (n, n) with products = Rᵀ · R, upper triangular; None where a vector is zero or nearly depends on others."""
    lengths = products.diagonal().sqrt()
    cosines, failed = torch.linalg.cholesky_ex(products / (lengths.unsqueeze(1) * lengths), upper=True)
    identity = torch.eye(len(cosines), dtype=cosines.dtype, device=cosines.device)
    # Not-a-number, of a column of length zero, compares as false.
    if failed or not torch.linalg.solve_triangular(cosines, identity, upper=True).norm() < LARGEST_INVERSE:
        return None
    factor: Tensor = cosines * lengths
    return factor


def where_it_pays(matrix: Tensor) -> Tensor:
    """The matrix on the device that decomposes it: its own, or the CPU for small ones and where MPS cannot."""
    small = min(matrix.shape) <= SMALL_SIDE and max(matrix.shape) <= SMALL_SIDE
    return matrix.cpu() if matrix.device.type == "mps" or (matrix.device.type != "cpu" and small) else matrix


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U, S, Vᵀ of ``matrix``, on the device where that pays.

    Signs are those of LAPACK; ``fix_signs`` makes them canonical once the left vectors are in full coordinates.
    """
    if 0 in matrix.shape:
        k = min(matrix.shape)
        return matrix.new_zeros(matrix.shape[0], k), matrix.new_zeros(k), matrix.new_zeros(k, matrix.shape[1])
    u, s, vh = drivers.svd(where_it_pays(matrix))
    return u.to(matrix.device), s.to(matrix.device), vh.to(matrix.device)


def fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` with the largest-magnitude entry of each column of ``left`` positive.

    Args:
        left: (d, k), singular vectors as columns.
        right: (k, m), their partners as rows.
    """
    if left.shape[0] == 0 or left.shape[1] == 0:
        return left, right
    signs = left_signs(left)
    return left * signs, right * signs.to(right).unsqueeze(1)


def left_signs(left: Tensor) -> Tensor:
    """(k,): that of the largest-magnitude entry of each column of a (d, k) matrix, the first of several that tie."""
    highest, lowest = left.amax(dim=0), -left.amin(dim=0)
    signs = torch.where(highest >= lowest, 1.0, -1.0).to(left.dtype)
    for tied in (highest == lowest).nonzero().flatten().tolist():
        column = left[:, tied]
        signs[tied] = 1.0 if column[column.abs().argmax()] >= 0 else -1.0
    return signs


def left_singular_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors U (d, k) of a tall ``matrix`` (d, n), descending, signs fixed, and Uᵀ · matrix (k, n).

    The latter is in float64. Directions at the level of rounding (σ ≤ max(d, n) · ε₆₄ · σ_max) are left out: they are
    arbitrary.
    """
    basis = thin_basis(matrix)
    u, s, _ = svd(basis.factor)
    kept = int((s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()).sum()) if s.numel() else 0
    u = u[:, :kept]
    return fix_signs(basis.times(u), u.T @ basis.factor)  # not diag(S)·Vᵀ: zero columns give zeros


def polar_factor(matrix: Tensor, rank_tolerance: float) -> Tensor:
    """U · Vᵀ of ``matrix`` (d, n) = U · diag(S) · Vᵀ: of all matrices with orthonormal rows or columns the nearest.

    Directions with σ ≤ ``rank_tolerance`` · σ_max are left out: their partners are arbitrary. So a rank-deficient
    matrix gives a partial isometry between its row space and its column space, and zero gives zero.

    Args:
        matrix: (d, n), of any rank.
        rank_tolerance: at least the level of rounding, 16 ε or so.

    Source: Fan & Hoffman 1955, theorem 1 (nearest); Löwdin's symmetric orthogonalisation where d ≥ n.
    """
    u, s, vh = svd(matrix)
    kept = int((s > rank_tolerance * s.max()).sum()) if s.numel() else 0
    return u[:, :kept] @ vh[:kept]


@dataclass(frozen=True, eq=False)
class JointDecomposition:
    """[ΔW_1 … ΔW_N] = U · diag(S) · [V_1ᵀ … V_Nᵀ], the right blocks kept as products.

    Attributes:
        left: U, (d_out, k), orthonormal columns.
        singular_values: S, (k,), descending.
        right_cores: (N, k, r_max); V_tᵀ = right_cores[t] · right_bases[t]. Zero-padded where ranks differ, zero where
            an update has no part in a direction but rounding.
        right_bases: (N, r_max, d_in), orthonormal rows (padding rows are zero).
    """

    left: Tensor
    singular_values: Tensor
    right_cores: Tensor
    right_bases: Tensor

    def right_norms(self) -> Tensor:
        """(N, k): ‖row i of V_tᵀ‖₂, from the cores alone since the bases are orthonormal."""
        norms: Tensor = torch.linalg.vector_norm(self.right_cores, dim=2)
        return norms


def joint_decomposition(updates: Sequence[LowRankUpdate], rank_tolerance: float) -> JointDecomposition:
    """The thin SVD of the updates side by side, from R × R products.

    B = [b_1 … b_N] = Q_B R_B and a_tᵀ = Q_t R_t, so that the concatenation is Q_B · K · blockdiag(Q_tᵀ) with the core
    K = R_B · blockdiag(s_t R_tᵀ), whose SVD gives everything.

    Args:
        updates: of one module; ranks may differ.
        rank_tolerance: singular values not above this share of the largest are cut.

    Source: KnOTS (Stoica et al., arXiv:2410.19735) and DRM (arXiv:2505.23117) take the same SVD of the dense
    concatenation.
    """
    stacked = thin_basis(torch.cat([u.b for u in updates], dim=1))
    bases, cores = [], []
    for update, columns in zip(updates, torch.split(stacked.factor, [u.rank for u in updates], dim=1), strict=True):
        q, r = thin_qr(update.a.T)
        cores.append(columns @ in_double(r).T * update.scaling)
        bases.append(q.T)
    u, s, vh = svd(torch.cat(cores, dim=1))
    kept = int((s > rank_tolerance * s.max()).sum()) if s.numel() else 0
    left, right = fix_signs(stacked.times(u[:, :kept]), vh[:kept])
    blocks = torch.split(right, [basis.shape[0] for basis in bases], dim=1)
    right_cores = pad_sequence([block.T for block in blocks], batch_first=True).transpose(1, 2).contiguous()
    right_cores *= _above_rounding(s[:kept], right_cores).unsqueeze(2)
    return JointDecomposition(left, s[:kept].to(left), right_cores.to(left), pad_sequence(bases, batch_first=True))


def _above_rounding(singular_values: Tensor, right_cores: Tensor) -> Tensor:
    """(N, k): whether an update has a real part in a direction."""
    sizes = singular_values * torch.linalg.vector_norm(right_cores, dim=2)
    # The values descend; slicing keeps an empty decomposition empty.
    real: Tensor = sizes > NOISE_FLOOR * torch.finfo(sizes.dtype).eps * singular_values[:1]
    return real
