"""``factors``: A and B each on their own, as peft's ``linear`` and ``ties`` do and as RobustMerge needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, low_rank, padded_stacks
from mergekit_lowrank.spaces.base import Coordinates, ModuleShape, Part, Space

__all__ = ["FactorCoordinates", "FactorSpace"]


class FactorCoordinates(Coordinates):
    """Two parts, A (r, d_in) and B (d_out, r), zero-padded to the largest rank.

    Merging them apart is quadratic: the product of the merged factors holds every cross term b_i · a_j. The weight and
    the scaling enter as √|w s| on both sides, their sign on A.

    Source: peft ``add_weighted_adapter``, combination types ``linear`` and ``ties``.
    """

    is_linear = False
    updates: tuple[LowRankUpdate, ...]

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)

    @cached_property
    def parts(self) -> tuple[Part, ...]:  # type: ignore[override]
        """A and B, stacked when they are first asked for: RobustMerge reads the updates themselves."""
        updates, weights = self.updates, self.weights
        b, a = padded_stacks(updates)
        products = [w * u.scaling for w, u in zip(weights, updates, strict=True)]
        roots = [math.sqrt(abs(p)) for p in products]
        signed = [math.copysign(root, p) for root, p in zip(roots, products, strict=True)]
        shares = [math.sqrt(abs(w)) for w in weights]
        signed_shares = [math.copysign(share, p) for share, p in zip(shares, products, strict=True)]
        return (
            Part.stacked("A", a, signed, [u.a.numel() for u in updates], signed_shares),
            Part.stacked("B", b, roots, [u.b.numel() for u in updates], shares),
        )

    def decode(self, merged: Sequence[Tensor]) -> LowRankUpdate:
        """The product of the two merged factors, never multiplied out."""
        a, b = merged
        return LowRankUpdate(b, a)


class FactorSpace(Space):
    """Coordinates are the entries of A and of B."""

    name = "factors"
    summary = "A and B merged apart (quadratic: brings cross terms B_i·A_j); for RobustMerge and to match peft"

    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> FactorCoordinates:
        """Coordinates that stack both factors when they are read."""
        return FactorCoordinates(low_rank(updates, self.name), weights)

    def merged_rank(self, shape: ModuleShape) -> int:
        """The largest input rank: the factors are merged component by component."""
        return max(shape.ranks)

    def working_entries(self, shape: ModuleShape) -> int:
        """Both stacks and both merged factors."""
        return (shape.inputs + 1) * max(shape.ranks) * (shape.d_out + shape.d_in)
