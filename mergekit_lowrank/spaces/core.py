"""``core``: every update between the singular vectors of the stacked factors (Core Space)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, left_singular_basis, low_rank
from mergekit_lowrank.spaces.base import Coordinates, ModuleShape, Part, Space, with_weights

__all__ = ["CoreCoordinates", "CoreSpace"]


class CoreCoordinates(Coordinates):
    """M_t = Uᵀ ΔW_t V, with U, V the singular vectors of the stacked unscaled factors in descending order.

    Computed in float64, as the reference does, and then held in the type of the factors. Uᵀ times the stacked b is what
    the decomposition of the stack leaves, so no product is as long as a factor.

    Attributes:
        left: U, (d_out, p).
        right: Vᵀ, (q, d_in).
        cores: (n, p, q), the M_t in float64.

    Source: Core Space (arXiv:2509.17786). Element-wise strategies depend on the basis: QR bases give other results.
    """

    updates: tuple[LowRankUpdate, ...]

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        self.left, left = left_singular_basis(torch.cat([u.b for u in updates], dim=1))
        right_basis, right = left_singular_basis(torch.cat([u.a for u in updates]).T)
        self.right = right_basis.T
        ranks = [u.rank for u in updates]
        pairs = zip(updates, torch.split(left, ranks, dim=1), torch.split(right, ranks, dim=1), strict=True)
        self.cores = torch.stack([u.scaling * b @ a.T for u, b, a in pairs])
        self.parts = (Part.stacked("core", self.cores.to(self.left), self.weights),)

    def decode(self, merged: Sequence[Tensor]) -> LowRankUpdate:
        """U · M · Vᵀ, M multiplied into the side that leaves the smaller rank."""
        core = merged[0]
        if core.shape[0] <= core.shape[1]:
            return LowRankUpdate(self.left, core @ self.right)
        return LowRankUpdate(self.left @ core, self.right)


class CoreSpace(Space):
    """Coordinates in the singular bases of the stacked factors."""

    name = "core"
    summary = "M_t = Uᵀ·ΔW_t·V between the singular vectors of the stacked factors, at most R×R (Core Space)"

    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> CoreCoordinates:
        """The cores of all updates, held in memory."""
        return CoreCoordinates(low_rank(updates, self.name), weights)

    def reweighted(self, coordinates: Coordinates, weights: Sequence[float]) -> Coordinates:
        """The same bases and cores: they do not depend on weights."""
        return with_weights(coordinates, weights)

    def working_entries(self, shape: ModuleShape) -> int:
        """Stacked factors with their bases, and the cores."""
        rows, columns = min(shape.joint_rank, shape.d_out), min(shape.joint_rank, shape.d_in)
        return 8 * shape.factor_entries + (4 * shape.inputs + 3) * rows * columns  # in float64, twice while stacked
