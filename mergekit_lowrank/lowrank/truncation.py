"""An update as an adapter of some rank: the best approximation, its spectrum, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.lowrank import drivers
from mergekit_lowrank.lowrank.decompositions import fix_signs, svd, thin_basis
from mergekit_lowrank.lowrank.krylov import frobenius_energy, krylov_space
from mergekit_lowrank.lowrank.scratch import empty
from mergekit_lowrank.lowrank.updates import DenseUpdate, LowRankUpdate, Update, densify

__all__ = ["Spectrum", "Truncation", "canonical", "factorise", "singular_values", "spectrum_of"]

EXACT_SIDE = 768
"""Dense deltas whose smaller side is at most this are decomposed exactly: it costs a few tenths of a second."""
SAFE_MAGNITUDES = (1e-12, 1e12)
"""Of the largest entry of a dense delta: outside, sums of squares in float32 might under- or overflow."""
SHARE_TOLERANCE = 1e-12
"""A sum of squares need not reach a share exactly: an allowance of the size of rounding in float64."""
ERROR_TOLERANCE = 1e-9
"""The same for a bound of the error, as a share of the bound: it may be much smaller than ``SHARE_TOLERANCE``."""
ROUNDING = 4.0
"""Singular values that should be zero come out below 0.4 · √k · ε · σ_max (measured in float32, on stacks of rank 8 to
400 that hold one update two to eight times). Ten times that is safe."""
PARTIAL_RESOLUTION = 1e-6
"""What a partial spectrum leaves out is a difference of energies, good to about this share of the whole in float32."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of an update and its whole energy.

    Attributes:
        values: (k,) float64, descending; all of the non-zero ones where ``complete``, else the leading ones.
        energy: ‖ΔW‖²_F, of the whole update.
        complete: whether ``values`` holds the whole spectrum.
        epsilon: of the type that the values were computed in.
    """

    values: Tensor
    energy: float
    complete: bool
    epsilon: float = torch.finfo(torch.float64).eps

    @property
    def resolved(self) -> int:
        """How many values stand above rounding, 4 · √k · ε · σ_max; the directions of the others are arbitrary."""
        if self.values.numel() == 0:
            return 0
        floor = ROUNDING * math.sqrt(self.values.numel()) * self.epsilon * float(self.values[0])
        return int((self.values > floor).sum())

    def kept(self, rank: int) -> float:
        """Share of the energy in the leading ``rank`` directions; 1 for a zero update."""
        if self.energy == 0.0 or (self.complete and rank >= self.values.numel()):
            return 1.0
        return min(float(self.values[:rank].square().sum()) / self.energy, 1.0)

    def error(self, rank: int) -> float:
        """‖ΔW − ΔW_rank‖_F / ‖ΔW‖_F for the leading ``rank`` directions; 0 for a zero update.

        From the values left out, so that it is right to its last digits where the spectrum is complete.
        """
        if self.energy == 0.0:
            return 0.0
        return math.sqrt(float(self._left_out()[min(rank, self.values.numel())]) / self.energy)

    def rank_for(self, share: float) -> int | None:
        """The least rank that keeps ``share`` of the energy (0 for a zero update); None where it was not computed."""
        return self._rank_leaving(1 - share + SHARE_TOLERANCE)

    def rank_within(self, error: float) -> int | None:
        """The least rank whose ``error`` is no larger (0 for a zero update); None where it was not computed.

        Directions at the level of rounding are never asked for: they do not make a result any better.
        """
        return self._rank_leaving(error * error * (1 + ERROR_TOLERANCE))

    def _rank_leaving(self, loss: float) -> int | None:
        if self.energy == 0.0:
            return 0
        if not self.complete and loss < PARTIAL_RESOLUTION:
            return None
        reached = (self._left_out() <= loss * self.energy).nonzero()
        return max(1, min(int(reached[0]), self.resolved)) if reached.numel() else None

    def _left_out(self) -> Tensor:
        """(k + 1,): the energy beyond the leading 0, 1, …, k directions."""
        beyond = torch.zeros(1, dtype=torch.float64)
        if not self.complete:
            beyond += max(self.energy - float(self.values.square().sum()), 0.0)
        return torch.cat([self.values.square(), beyond]).flip(0).cumsum(0).flip(0)


@dataclass(frozen=True, eq=False)
class Truncation:
    """U · diag(S) · Vᵀ of an update, complete or its leading part, ready to be cut at a rank.

    Attributes:
        vectors: gives the leading k columns of U and rows of Vᵀ, signs fixed; fewer where there are fewer. They are
            multiplied out when they are asked for.
        spectrum: all singular values that were found.
    """

    vectors: Callable[[int], tuple[Tensor, Tensor]]
    spectrum: Spectrum

    def cut(self, rank: int) -> LowRankUpdate:
        """The leading ``rank`` directions as b = U·S, a = Vᵀ; fewer where there are fewer."""
        left, right = self.vectors(rank)
        return LowRankUpdate(left * self.spectrum.values[:rank].to(left), right)

    def times(self, factor: float) -> Truncation:
        """That of the update times a positive factor."""
        spectrum = replace(
            self.spectrum, values=self.spectrum.values * factor, energy=self.spectrum.energy * factor * factor
        )
        return replace(self, spectrum=spectrum)

    def balanced(self, rank: int) -> LowRankUpdate:
        """The leading ``rank`` directions as b = U·√S, a = √S·Vᵀ; fewer where there are fewer."""
        left, right = self.vectors(rank)
        roots = self.spectrum.values[:rank].sqrt().to(left)
        return LowRankUpdate(left * roots, roots.unsqueeze(1) * right)


def _factorise_low(update: LowRankUpdate) -> Truncation:
    left, right = thin_basis(update.b), thin_basis(update.a.T)
    u, s, vh = svd(left.factor @ right.factor.T * update.scaling)
    return Truncation(
        lambda rank: fix_signs(left.times(u[:, :rank]), right.times(vh[:rank].T).T), _whole_spectrum(s, update)
    )


def _whole_spectrum(singular_values: Tensor, update: Update) -> Spectrum:
    values = singular_values.cpu().double()
    epsilon = torch.finfo(update.dtype).eps
    return Spectrum(values, float(values.square().sum()), complete=True, epsilon=epsilon)


def canonical(update: LowRankUpdate) -> LowRankUpdate:
    """The same update as b = U·√S, a = √S·Vᵀ with fixed signs: factors that do not depend on how it was factorised.

    (b·G, G⁻¹·a) gives the same factors for every invertible G, to rounding, as long as the singular values are
    distinct: among equal ones the directions are arbitrary. The rank stays what it is; directions at the level of
    rounding become zeros. The scaling goes into the factors.
    """
    truncation = _factorise_low(update)
    balanced = truncation.balanced(truncation.spectrum.resolved)
    missing = update.rank - balanced.rank
    return LowRankUpdate(pad(balanced.b, (0, missing)), pad(balanced.a, (0, 0, 0, missing)))


def spectrum_of(update: LowRankUpdate) -> Spectrum:
    """The singular values of a low-rank update, from its core; no vectors."""
    r_b, r_a = thin_basis(update.b).factor, thin_basis(update.a.T).factor
    return _whole_spectrum(drivers.svdvals((r_b @ r_a.T * update.scaling).cpu()), update)


def singular_values(updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    """(r_t,) float64 of each of n updates, descending, on the CPU: to look at, in a third of the time of spectra.

    σ² are eigenvalues of products of Gram matrices in the type of the factors, so what is below the square root of its
    ε (3e-4 for float32) of the largest is rounding. The eigenvalues of all updates are found together.
    """
    left, right = _grams([u.b for u in updates]), _grams([u.a.T for u in updates])
    energies, vectors = torch.linalg.eigh(left)
    roots = (vectors * energies.clamp(min=0).sqrt().unsqueeze(1)).transpose(1, 2)
    squares = torch.linalg.eigvalsh(roots @ right @ roots.transpose(1, 2)).clamp(min=0).flip(1)
    return [own[: u.rank].sqrt() * abs(u.scaling) for own, u in zip(squares, updates, strict=True)]


def _grams(factors: Sequence[Tensor]) -> Tensor:
    """(n, r_max, r_max) float64, on the CPU: the inner products of the columns of each (d, r_t); zero beyond r_t."""
    largest = max(factor.shape[1] for factor in factors)
    total = torch.zeros(len(factors), largest, largest, dtype=torch.float64)
    for own, factor in zip(total, factors, strict=True):
        own[: factor.shape[1], : factor.shape[1]] = factor.T @ factor
    return total


def _factorise_dense(delta: Tensor) -> Truncation:
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T  # a wide one costs three times its transpose
    u, s, vh = svd(tall)
    left, right = (u, vh) if tall is delta else (vh.T, u.T)
    return Truncation(lambda rank: fix_signs(left[:, :rank], right[:rank]), _whole_spectrum(s, DenseUpdate(delta)))


def _randomised(delta: Tensor, rank: int, generator: torch.Generator) -> Truncation:
    """The SVD of the delta projected on a Krylov space of its shorter side."""
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
    basis, images = krylov_space(wide, rank, generator)
    rows = thin_basis(images)
    u, s, vh = svd(rows.factor.T)

    def vectors(count: int) -> tuple[Tensor, Tensor]:
        left, right = basis @ u[:, :count].to(basis), rows.times(vh[:count].T).T
        return fix_signs(left, right) if wide is delta else fix_signs(right.T, left.T)

    complete = basis.shape[1] == wide.shape[0]
    epsilon = torch.finfo(delta.dtype).eps
    return Truncation(vectors, Spectrum(s.cpu().double(), frobenius_energy(delta), complete, epsilon))


def factorise(update: Update, rank: int, generator: torch.Generator) -> Truncation:
    """Singular directions of an update: all of them for a low-rank one, at least ``rank`` for a dense one.

    Low-rank updates go through their core: the same result as the SVD of the delta, in O(d · r²). Dense ones with a
    side of at most 768 are decomposed exactly. Larger ones by a randomised block Krylov space, grown until ``rank``
    directions capture their energy to 5e-4 by its own account, to 1e-3 as measured; what is captured is reported, so
    the loss is known.

    Args:
        update: to be approximated.
        rank: how many leading directions a dense update must give.
        generator: on the CPU; the start of the Krylov space.
    """
    if isinstance(update, LowRankUpdate):
        return _factorise_low(update)
    delta = densify(update)
    if min(delta.shape) <= max(EXACT_SIDE, rank):
        return _factorise_dense(delta)
    peak = float(torch.stack([*torch.aminmax(delta)]).abs().max())
    if peak == 0 or SAFE_MAGNITUDES[0] < peak < SAFE_MAGNITUDES[1]:
        return _randomised(delta, rank, generator)
    scaled = torch.div(delta, peak, out=empty(update.shape, delta.dtype, delta.device))
    return _randomised(scaled, rank, generator).times(peak)
