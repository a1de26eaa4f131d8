"""What the methods in ``core`` share: updates between the core bases, their singular triplets, and the way back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank import (
    Coordinates,
    LowRankUpdate,
    MergeContext,
    ModuleShape,
    Params,
    Space,
    Strategy,
    StrategyError,
    Update,
)
from mergekit_lowrank.lowrank import factorise, in_double, polar_factor
from mergekit_lowrank.spaces import CoreCoordinates

__all__ = ["CoreStrategy", "Cores", "OrthogonalisingParams", "Triplets", "leading", "orthogonalised"]


class OrthogonalisingParams(Params):
    """The parameter of methods that give directions a weight of their own."""

    rank_tolerance: float = Field(
        1e-5,
        ge=0,
        lt=1,
        description="singular values up to this share of the norm of what they belong to are rounding, and their "
        "directions are left out; directions of two inputs that differ by less are one",
    )


@dataclass(frozen=True, eq=False)
class Cores:
    """The updates of one module between the core bases.

    Attributes:
        updates: M_t = s_t (Uᵀ b_t)(a_t V), (p, q), low-rank as the inputs are, in float64.
        directions: min(R, d_out, d_in): the rank of the stacked updates where nothing is degenerate, and what stands
            for the papers' min(d_out, d_in), which is the rank of full fine-tunes.
    """

    updates: tuple[LowRankUpdate, ...]
    directions: int

    @classmethod
    def of(cls, coordinates: CoreCoordinates) -> Cores:
        """The cores of all inputs, from their factors."""
        left, right = in_double(coordinates.left).T, in_double(coordinates.right).T
        cores = (LowRankUpdate(left @ in_double(u.b), in_double(u.a) @ right, u.scaling) for u in coordinates.updates)
        return cls(tuple(cores), min(sum(u.rank for u in coordinates.updates), *coordinates.updates[0].shape))

    def weighted(self, weights: Sequence[float]) -> tuple[LowRankUpdate, ...]:
        """w_t M_t."""
        return tuple(core.scaled(w) for core, w in zip(self.updates, weights, strict=True))


@dataclass(frozen=True, eq=False)
class Triplets:
    """Leading singular triplets, in float64.

    Attributes:
        left: (p, k), orthonormal columns.
        values: (k,), descending and positive.
        right: (k, q), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def leading(core: LowRankUpdate, count: int, floor: float) -> Triplets:
    """The leading ``count`` triplets of a core; fewer where fewer of its singular values exceed ``floor``."""
    whole = factorise(core, count, torch.Generator())
    kept = min(count, int((whole.spectrum.values > floor).sum()))
    left, right = whole.vectors(kept)
    return Triplets(left, whole.spectrum.values[:kept].to(left), right)


def orthogonalised(triplets: Sequence[Triplets], rank_tolerance: float) -> tuple[Tensor, Tensor]:
    """U* (p, K) and V* (K, q): the polar factors of all left vectors side by side and of all right ones."""
    left = polar_factor(torch.cat([t.left for t in triplets], dim=1), rank_tolerance)
    return left, polar_factor(torch.cat([t.right for t in triplets]), rank_tolerance)


class CoreStrategy(Strategy):
    """A method of the cores' singular vectors: it sees the updates only, so the factors' gauge does not matter."""

    spaces = ("core",)

    @abstractmethod
    def merged_core(self, cores: Cores, context: MergeContext) -> Tensor:
        """The merged core, (p, q)."""

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The merged core between the bases: an adapter of rank min(p, q) at most."""
        if not isinstance(coordinates, CoreCoordinates):
            raise StrategyError(f"'{self.name}' works in space 'core', not in {type(coordinates).__name__}")
        return coordinates.decode([self.merged_core(Cores.of(coordinates), context).to(coordinates.left)])

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """Bases and one input in float64; factors, triplets and decompositions between them, R × R."""
        sides = min(shape.joint_rank, shape.d_out) + min(shape.joint_rank, shape.d_in)
        return space.working_entries(shape) + 4 * shape.factor_entries + 12 * shape.joint_rank * sides
