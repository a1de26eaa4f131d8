"""Where several low-rank updates point: their singular directions in two joint bases, and what a merge makes of them.

The stacks [b_1 … b_N] = Q_B R_B and [a_1ᵀ … a_Nᵀ] = Q_A R_A give ΔW_t = Q_B · C_t · Q_Aᵀ with cores C_t of at most
R × R, R = Σ r_t. Orthonormal bases keep lengths and angles, so everything about the inputs is found from the cores, in
float64, in O(d · R²).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import drivers
from mergekit_lowrank.lowrank.decompositions import GRAM_COLUMNS, ThinBasis, gram, in_double, svd, thin_basis, thin_qr
from mergekit_lowrank.lowrank.truncation import Spectrum
from mergekit_lowrank.lowrank.updates import DenseUpdate, LowRankUpdate, StreamedUpdate, Update, blocks_of_rows

__all__ = ["Directions", "JointDirections", "joint_directions", "principal_angles", "turned_cosines"]

ALIGNED = 0.5
"""Principal angles of a larger squared cosine come from their sines: a cosine near 1 has lost half of its digits."""
DENSE_ENTRIES = 1 << 19
"""Entries of a dense merged update that are in float64 at once (4 MiB)."""
ROUNDED = 1e-6
"""What M makes of a direction at or below this share of ‖w ΔW‖ over all updates, or of what M is made of where that is
more, is rounding: merges compute in float32, and lengths are roots of Gram products, good to 1e-8."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The thin SVD of one update between the joint bases, to its numerical rank k: C = left · diag(values) · rightᵀ.

    Attributes:
        left: (p, k) float64, orthonormal columns, in the basis of the stacked b.
        values: (k,) float64, descending, all above 4 · √r · ε · σ₁, ε of the factors' type.
        right: (q, k) float64, orthonormal columns, in the basis of the stacked aᵀ.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """k; 0 of a zero update."""
        return self.values.numel()

    def leading(self, error: float) -> int:
        """The least number of directions that hold the update to a relative error in the Frobenius norm."""
        left_out = torch.cat([self.values.square(), self.values.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        return int((left_out > error * error * left_out[0]).sum())


@dataclass(frozen=True, eq=False)
class JointDirections:
    """The singular directions of n updates of one module, all of them in the same two bases.

    Attributes:
        left_basis: of the stacked b: ΔW_t = Q_B · C_t · Q_Aᵀ.
        right_basis: of the stacked aᵀ.
        updates: the directions of each.
    """

    left_basis: ThinBasis
    right_basis: ThinBasis
    updates: tuple[Directions, ...]

    @cached_property
    def left(self) -> Tensor:
        """(p, K): the left directions of all updates side by side, K = Σ k_t."""
        return torch.cat([own.left for own in self.updates], dim=1)

    @cached_property
    def right(self) -> Tensor:
        """(q, K): the right ones."""
        return torch.cat([own.right for own in self.updates], dim=1)

    @cached_property
    def values(self) -> Tensor:
        """(K,): the singular values of all updates, one after the other."""
        return torch.cat([own.values for own in self.updates])

    @cached_property
    def _members(self) -> Tensor:
        """(K, n): 1 where a direction is one of an update."""
        return self._first([own.rank for own in self.updates])

    def _first(self, counts: Sequence[int]) -> Tensor:
        """(K, n): 1 where a direction is one of the first so many of an update."""
        rows = [own.left.new_zeros(own.rank, len(counts)) for own in self.updates]
        for t, (block, count) in enumerate(zip(rows, counts, strict=True)):
            block[:count, t] = 1
        return torch.cat(rows)

    def inner_products(self) -> Tensor:
        """(n, n): <ΔW_s, ΔW_t>."""
        products = (self.left.T @ self.left) * (self.right.T @ self.right)
        return self._members.T @ (self.values.unsqueeze(1) * products * self.values) @ self._members

    def overlaps(self, directions: Tensor) -> Tensor:
        """(n, n): the mean cos² of the principal angles of each pair of spaces, min(k_s, k_t) of them; nan for zeros.

        Args:
            directions: ``right`` for row spaces, ``left`` for column spaces.
        """
        total = self._members.T @ (directions.T @ directions).square() @ self._members
        ranks = self._members.sum(dim=0)
        return (total / torch.minimum(ranks, ranks.unsqueeze(1))).clamp(max=1)

    def smallest_angles(self, directions: Tensor) -> Tensor:
        """(n, n): the least principal angle of each pair of spaces, in radians; nan for zeros."""
        spaces = torch.split(directions, [own.rank for own in self.updates], dim=1)
        angles = directions.new_full((len(spaces), len(spaces)), torch.nan)
        for s, own in enumerate(spaces):
            angles[s, s] = 0.0 if own.shape[1] else torch.nan
            for t, other in enumerate(spaces[:s]):
                if own.shape[1] and other.shape[1]:
                    angles[s, t] = angles[t, s] = principal_angles(own, other)[0]
        return angles

    def alignments(self, directions: Tensor, error: float) -> Tensor:
        """(n, n): the subspace alignment ratio ‖ΔW_s · P_t‖_F / ‖ΔW_s‖_F; nan for zeros.

        P_t projects on the leading directions of ΔW_t, the least number of them that hold it to a relative error.

        Args:
            directions: ``right``, or ``left`` for ‖P_t · ΔW_s‖_F.
            error: 0.05 in the paper.

        Source: Marczak et al. 2025 (arXiv:2502.04959), equations 5 and 6, there of a task against the merged update;
            Core Space (arXiv:2509.17786) takes it between tasks.
        """
        energies = self.values.square()
        products = energies.unsqueeze(1) * (directions.T @ directions).square()
        leading = self._first([own.leading(error) for own in self.updates])
        shares: Tensor = (self._members.T @ products @ leading) / (self._members.T @ energies).unsqueeze(1)
        return shares.where(self._members.sum(dim=0) > 0, torch.nan).clamp(max=1).sqrt()

    def weighted_values(self, weights: Sequence[float]) -> Tensor:
        """(min(p, q),) float64: the singular values of Σ w_t ΔW_t, descending."""
        scales = torch.cat([w * own.values for own, w in zip(self.updates, weights, strict=True)])
        return drivers.svdvals((self.left * scales) @ self.right.T)


def joint_directions(updates: Sequence[LowRankUpdate]) -> JointDirections:
    """The singular directions of low-rank updates of one module, at least one, on the CPU in float64."""
    left, right = thin_basis(torch.cat([u.b for u in updates], dim=1)), thin_basis(torch.cat([u.a for u in updates]).T)
    ranks = [u.rank for u in updates]
    columns = zip(*(torch.split(basis.factor.cpu(), ranks, dim=1) for basis in (left, right)), strict=True)
    return JointDirections(left, right, tuple(_directions(u, *own) for u, own in zip(updates, columns, strict=True)))


def _directions(update: LowRankUpdate, left: Tensor, right: Tensor) -> Directions:
    """Of s · left · rightᵀ, from the triangular factors (p, r) and (q, r)."""
    (q_left, r_left), (q_right, r_right) = thin_qr(left), thin_qr(right)
    u, s, vh = svd(r_left @ r_right.T * update.scaling)
    kept = Spectrum(s, float(s.square().sum()), complete=True, epsilon=torch.finfo(update.dtype).eps).resolved
    return Directions(q_left @ u[:, :kept], s[:kept], q_right @ vh[:kept].T)


def principal_angles(x: Tensor, y: Tensor) -> Tensor:
    """(min(k, m),) ascending, in radians: the principal angles of the spaces of orthonormal columns (d, k) and (d, m).

    Small angles come from the singular values of the part of one basis outside the other space, their sines; large ones
    from the cosines. Each is right to about the ε of the type.

    Source: Björck & Golub 1973, Math. Comp. 27; Knyazev & Argentati 2002, SIAM J. Sci. Comput. 23, algorithm 3.1.
    """
    wide, thin = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    cosines_of_pairs = wide.T @ thin
    cosines = drivers.svdvals(cosines_of_pairs).clamp(max=1)
    if cosines.numel() == 0 or cosines[0].square() <= ALIGNED:
        return cosines.arccos()
    sines = drivers.svdvals(thin - wide @ cosines_of_pairs).clamp(max=1).flip(0)[: cosines.numel()]
    return torch.where(cosines.square() > ALIGNED, sines.arcsin(), cosines.arccos())


def turned_cosines(merged: Update, directions: JointDirections, weights: Sequence[float]) -> Tensor:
    """(K,) float64, on the CPU: how far M keeps each singular direction of each w_t ΔW_t.

    w ΔW sends v_i to ±σ_i·u_i. M sends it to M·v_i, and its transpose u_i to Mᵀ·u_i; the result is the mean of
    cos∠(M·v_i, ±u_i) and cos∠(Mᵀ·u_i, ±v_i): 1 where the direction is as it was, 0 where it is turned into what the
    update has nothing of, −1 where it is reversed. Not-a-number where M makes nothing of it, or the weight is zero.

    Args:
        merged: M.
        directions: of the n updates.
        weights: w_t.
    """
    find = _low_rank_images if isinstance(merged, LowRankUpdate) else _dense_images
    products, outputs, inputs, size = find(merged, directions)  # type: ignore[arg-type] # each has its kind
    scales = torch.cat([w * own.values for own, w in zip(directions.updates, weights, strict=True)])
    floor = ROUNDED * max(size, float(scales.norm()))
    cosines = torch.stack([(products / length).where(length > floor, torch.nan) for length in (outputs, inputs)])
    turned: Tensor = cosines.mean(dim=0).clamp(-1, 1) * scales.sign().where(scales != 0, torch.nan)
    return turned


def _low_rank_images(merged: LowRankUpdate, directions: JointDirections) -> tuple[Tensor, Tensor, Tensor, float]:
    """u_iᵀ M v_i, ‖M v_i‖ and ‖Mᵀ u_i‖, each (K,), and the size of the components of M: from small Gram matrices."""
    left = directions.left.T @ _coordinates(directions.left_basis, merged.b)
    right = directions.right.T @ _coordinates(directions.right_basis, merged.a.T)
    of_b, of_a = gram(merged.b.T).cpu(), gram(merged.a).cpu()
    outputs, inputs = (
        ((own @ products) * own).sum(dim=1).clamp(min=0).sqrt() * abs(merged.scaling)
        for own, products in ((right, of_b), (left, of_a))
    )
    size = float(of_b.diagonal() @ of_a.diagonal()) ** 0.5 * abs(merged.scaling)
    return (left * right).sum(dim=1) * merged.scaling, outputs, inputs, size


def _coordinates(basis: ThinBasis, vectors: Tensor) -> Tensor:
    """(k, m) float64, on the CPU: Qᵀ · vectors (d, m)."""
    total = in_double(vectors.new_zeros(basis.columns.shape[1], vectors.shape[1]))
    pairs = zip(torch.split(basis.columns, GRAM_COLUMNS), torch.split(vectors, GRAM_COLUMNS), strict=True)
    for columns, own in pairs:
        total += in_double(columns).T @ in_double(own)
    if not basis.is_formed:
        total = torch.linalg.solve_triangular(basis.factor.T.to(total), total, upper=False)
    return total.cpu()


def _dense_images(
    merged: DenseUpdate | StreamedUpdate, directions: JointDirections
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The same of a dense M, and its norm; M is read once by blocks of rows."""
    left = in_double(directions.left_basis.times(directions.left))
    right = in_double(directions.right_basis.times(directions.right))
    products, outputs, inputs = left.new_zeros(left.shape[1]), left.new_zeros(left.shape[1]), torch.zeros_like(right)
    energy = 0.0
    for where in blocks_of_rows(merged.shape, DENSE_ENTRIES):
        rows = in_double(merged.rows(where))
        images = rows @ right
        products += (images * left[where]).sum(dim=0)
        outputs += images.square().sum(dim=0)
        inputs.addmm_(rows.T, left[where])
        energy += float(rows.square().sum())
    lengths = torch.linalg.vector_norm(inputs, dim=0)
    return products.cpu(), outputs.sqrt().cpu(), lengths.cpu(), energy**0.5
