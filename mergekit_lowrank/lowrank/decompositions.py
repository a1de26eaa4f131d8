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

from mergekit_lowrank.lowrank.updates import LowRankUpdate

__all__ = [
    "JointDecomposition",
    "fix_signs",
    "in_double",
    "joint_decomposition",
    "left_singular_basis",
    "polar_factor",
    "svd",
    "thin_qr",
    "triangular_factor",
]

SMALL_SIDE = 512
"""Matrices up to this size on both sides, such as cores, are decomposed on the CPU: the transfer costs less than many
small kernels on a GPU. MPS has no decompositions of its own. Not yet measured on a GPU."""


NOISE_FLOOR = 16.0
"""In units of ε·σ_max: an update's part σ_i·‖V_t,i‖ of a joint direction at or below this is rounding of the joint SVD
(measured on updates that are zero: at most 4, for joint ranks up to 1024), and is made zero. Trims and elections would
take it for entries of the update, and DRM would renormalise it to a unit vector of noise."""


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU where its device has no float64 (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def thin_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (d, k) with orthonormal columns and R (k, n), matrix = Q · R, k = min(d, n). Rank deficiency is ordinary."""
    if 0 in matrix.shape:
        k = min(matrix.shape)
        return matrix.new_zeros(matrix.shape[0], k), matrix.new_zeros(k, matrix.shape[1])
    q, r = torch.linalg.qr(_where_it_pays(matrix))
    return q.to(matrix.device), r.to(matrix.device)


def triangular_factor(matrix: Tensor) -> Tensor:
    """R (k, n) of the thin QR alone, which costs half: it has the inner products of the columns of ``matrix``."""
    if 0 in matrix.shape:
        return matrix.new_zeros(min(matrix.shape), matrix.shape[1])
    r: Tensor = torch.linalg.qr(_where_it_pays(matrix), mode="r").R
    return r.to(matrix.device)


def _where_it_pays(matrix: Tensor) -> Tensor:
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
    u, s, vh = torch.linalg.svd(_where_it_pays(matrix), full_matrices=False)
    return u.to(matrix.device), s.to(matrix.device), vh.to(matrix.device)


def fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` with the largest-magnitude entry of each column of ``left`` positive.

    Args:
        left: (d, k), singular vectors as columns.
        right: (k, m), their partners as rows.
    """
    if left.shape[0] == 0 or left.shape[1] == 0:
        return left, right
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs.T


def left_singular_basis(matrix: Tensor) -> Tensor:
    """The left singular vectors of a tall ``matrix`` (d, n) as columns (d, k), descending, signs fixed.

    Directions at the level of rounding (σ ≤ max(d, n) · ε · σ_max) are left out: they are arbitrary.
    """
    q, r = thin_qr(matrix)
    u, s, vh = svd(r)
    kept = int((s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()).sum()) if s.numel() else 0
    left, _ = fix_signs(q @ u[:, :kept], vh[:kept])
    return left


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
    q_b, r_b = thin_qr(torch.cat([u.b for u in updates], dim=1))
    bases, cores, start = [], [], 0
    for update in updates:
        q, r = thin_qr(update.a.T)
        cores.append(r_b[:, start : start + update.rank] @ r.T * update.scaling)
        bases.append(q.T)
        start += update.rank
    u, s, vh = svd(torch.cat(cores, dim=1))
    kept = int((s > rank_tolerance * s.max()).sum()) if s.numel() else 0
    left, right = fix_signs(q_b @ u[:, :kept], vh[:kept])
    blocks = torch.split(right, [basis.shape[0] for basis in bases], dim=1)
    right_cores = pad_sequence([block.T for block in blocks], batch_first=True).transpose(1, 2).contiguous()
    right_cores *= _above_rounding(s[:kept], right_cores).unsqueeze(2)
    return JointDecomposition(left, s[:kept], right_cores, pad_sequence(bases, batch_first=True))


def _above_rounding(singular_values: Tensor, right_cores: Tensor) -> Tensor:
    """(N, k): whether an update has a real part in a direction."""
    sizes = singular_values * torch.linalg.vector_norm(right_cores, dim=2)
    # The values descend; slicing keeps an empty decomposition empty.
    real: Tensor = sizes > NOISE_FLOOR * torch.finfo(sizes.dtype).eps * singular_values[:1]
    return real
