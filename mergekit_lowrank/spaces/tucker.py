"""``tucker``: every update in one pair of bases of small rank, shared by all (Compress-then-Merge)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, drivers, fix_signs, low_rank
from mergekit_lowrank.spaces.base import Coordinates, ModuleShape, Part, Space, SpaceParams, with_weights
from mergekit_lowrank.spaces.core import CoreCoordinates

__all__ = ["TuckerCoordinates", "TuckerParams", "TuckerSpace"]

SETTLED = 1e-6
"""The bases are found when a round changes the captured energy by less than this share of it (the code's tol)."""


class TuckerParams(SpaceParams):
    """How large the shared bases are, and how much the size of an update counts when they are chosen."""

    subspace_rank: int | None = Field(
        None,
        ge=1,
        description="directions in either basis, so the rank of the result; null: the largest input rank",
    )
    norm_balance: float = Field(
        0.25,
        ge=0,
        le=1,
        description="for the choice of the bases each update is scaled to β·‖its own norm‖ + (1 − β)·‖the mean norm‖: "
        "0 lets all count alike, 1 leaves them as they are (the paper's β)",
    )
    rounds: int = Field(1000, ge=0, description="alternations between the two bases at most; 0 takes the first guess")


class TuckerCoordinates(Coordinates):
    """O_t = Uᵀ ΔW_t V, (k, k), with the U and V that capture most of the balanced updates (Tucker-2 decomposition).

    What lies outside the bases is lost before the merge, not after it. U and V are found between the singular vectors
    of the stacked factors, so no step sees a dense delta; in float64.

    Attributes:
        left: U, (d_out, k).
        right: Vᵀ, (k, d_in).

    Source: Compress-then-Merge (He et al. 2026, arXiv:2606.03723) and its code.
    """

    is_linear = False
    updates: tuple[LowRankUpdate, ...]

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float], params: TuckerParams) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        core = CoreCoordinates(updates, weights)
        rank = min(params.subspace_rank or max(u.rank for u in updates), *core.cores.shape[1:])
        u, v = _shared_bases(_balanced(core.cores, params.norm_balance), rank, params.rounds)
        self.left, u_t = fix_signs(core.left @ u.to(core.left), u.T)
        right, v_t = fix_signs(core.right.T @ v.to(core.right), v.T)
        self.right = right.T
        self.parts = (Part.stacked("tucker", (u_t @ core.cores @ v_t.T).to(core.left), self.weights),)

    def decode(self, merged: Sequence[Tensor]) -> LowRankUpdate:
        """U · O · Vᵀ."""
        return LowRankUpdate(self.left @ merged[0], self.right)


def _balanced(cores: Tensor, balance: float) -> Tensor:
    """Each core scaled to a mixture of its own norm and the mean norm; zero cores stay zero and do not count."""
    norms = torch.linalg.matrix_norm(cores)
    present = norms > 0
    mean = norms.sum() / present.sum().clamp(min=1)
    factors = torch.where(present, balance + (1 - balance) * mean / torch.where(present, norms, 1), 0)
    return cores * factors.view(-1, 1, 1)


def _shared_bases(cores: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """U (p, k) and V (q, k) that maximise Σ_t ‖Uᵀ X_t V‖²: HOSVD first, then alternations (HOOI)."""
    u, v = _leading(_rows(cores), rank), _leading(_rows(cores.mT), rank)
    captured = 0.0
    for _ in range(rounds):
        u = _leading(_rows(cores @ v), rank)
        v = _leading(_rows((u.T @ cores).mT), rank)
        previous, captured = captured, float((u.T @ cores @ v).square().sum())
        if captured - previous <= SETTLED * captured:
            break
    return u, v


def _rows(stack: Tensor) -> Tensor:
    """Matrices (n, p, q) side by side, (p, n·q)."""
    return stack.transpose(0, 1).flatten(1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, from the Gram matrix of the rows (float64: only their span matters)."""
    _, vectors = drivers.eigh((matrix @ matrix.T).cpu())
    leading: Tensor = vectors.flip(1)[:, :rank].to(matrix.device)
    return leading


class TuckerSpace(Space):
    """Coordinates in one pair of bases, shared by all inputs and as small as the result."""

    name = "tucker"
    summary = "Uᵀ·ΔW_t·V in the two bases of rank k that hold most of all updates (Compress-then-Merge); lossy"
    Params = TuckerParams
    params: TuckerParams

    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> TuckerCoordinates:
        """The small cores of all updates, held in memory."""
        return TuckerCoordinates(low_rank(updates, self.name), weights, self.params)

    def reweighted(self, coordinates: Coordinates, weights: Sequence[float]) -> Coordinates:
        """The same bases and cores: they do not depend on weights."""
        return with_weights(coordinates, weights)

    def merged_rank(self, shape: ModuleShape) -> int:
        """The rank of the bases."""
        rank = self.params.subspace_rank or max(shape.ranks)
        return min(rank, super().merged_rank(shape))

    def working_entries(self, shape: ModuleShape) -> int:
        """Stacked factors in float64 with their bases, the cores of core space and their products."""
        rows, columns = min(shape.joint_rank, shape.d_out), min(shape.joint_rank, shape.d_in)
        return 12 * shape.factor_entries + 6 * (shape.inputs + 2) * rows * columns
