"""Methods that see lengths and angles of the updates only: one Gram matrix in, one coefficient for each input out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import (
    InputUpdate,
    LowRankUpdate,
    Update,
    are_low_rank,
    concatenate,
    densify,
    in_double,
    inner_products,
    low_rank,
)
from mergekit_lowrank.spaces import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space
from mergekit_lowrank.strategies.base import MergeContext, Params, Strategy
from mergekit_lowrank.strategies.sums import summed

__all__ = ["GramParams", "GramStrategy", "lengths_and_cosines", "over", "row_grams"]


class GramParams(Params):
    """What all of these methods take."""

    granularity: Literal["tensor", "row", "column"] = Field(
        "tensor",
        description="what has a length and a direction of its own: the whole update, each of its rows (one output "
        "feature each), or each of its columns",
    )


class GramStrategy(Strategy):
    """Σ_t c_t ΔW_t, where the coefficients c depend on the inner products <ΔW_s, ΔW_t> only.

    These come from r × r products of the factors, in float64, and the sum is a concatenation of factors: exact, of
    rank Σ r_t, no delta multiplied out. Lengths and angles are the same in every orthonormal basis, so ``joint`` and
    ``core`` could give nothing else than ``delta`` does. In ``factors`` A and B are merged as a matrix each, the
    scaling in both as √|s|, its sign on A. Where an input is dense, both the inner products and the sum come from
    blocks of rows.

    A subclass implements ``coefficients``.
    """

    Params = GramParams
    spaces = ("delta", "factors")
    takes_dense = True
    params: GramParams

    @abstractmethod
    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """(…, n): what each input is multiplied by.

        Args:
            gram: (…, n, n), float64: inner products of the n updates; with a leading dimension one matrix for each row
                or column.
            context: of the module.
        """

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The concatenation in ``delta``, or a matrix of dense inputs; in ``factors`` the product of merged factors."""
        if not coordinates.is_linear:
            sides = factors_apart(low_rank(coordinates.updates, self.name))
            return coordinates.decode([densify(self._combined(side, context)) for side in sides])
        if are_low_rank(coordinates.updates):
            return self._combined(coordinates.updates, context)
        return coordinates.decode([self._summed(part, coordinates.updates, context) for part in coordinates.parts])

    def _combined(self, updates: Sequence[LowRankUpdate], context: MergeContext) -> LowRankUpdate:
        match self.params.granularity:
            case "tensor":
                return concatenate(updates, self.coefficients(inner_products(updates), context).tolist())
            case "row":
                return self._combined_by_row(updates, context)
            case "column":
                return self._combined_by_row([u.transposed() for u in updates], context).transposed()

    def _combined_by_row(self, updates: Sequence[LowRankUpdate], context: MergeContext) -> LowRankUpdate:
        """[diag(c_t) s_t b_t] · [a_t]."""
        c = torch.cat([self.coefficients(gram, context) for gram in row_grams(updates)])
        scaled = (u.b * (own * u.scaling).to(u.b).unsqueeze(1) for u, own in zip(updates, c.T, strict=True))
        return LowRankUpdate(torch.cat([*scaled], dim=1), torch.cat([u.a for u in updates]))

    def _summed(self, part: Part, updates: Sequence[InputUpdate], context: MergeContext) -> Tensor:
        """The merged delta where an input is dense."""
        match self.params.granularity:
            case "tensor":
                return summed(part, self.coefficients(inner_products(updates), context).tolist())
            case "row":
                return part.merged(lambda block: _multiplied(block, self.coefficients(_products(block, 2), context), 2))
            case "column":
                gram = torch.as_tensor(sum(_products(block, 1) for block in part.blocks()))
                c = self.coefficients(gram, context)
                return part.merged(lambda block: _multiplied(block, c, 1))

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """The concatenation with its temporaries, and two factors in float64; all of them and a block where by row."""
        if shape.dense:
            vectors = {"tensor": 0, "row": shape.d_out, "column": shape.d_in}[self.params.granularity]
            return super().working_entries(shape, space) + 16 * shape.inputs**2 * (1 + vectors)
        coordinates = 0 if space.name == "delta" else space.working_entries(shape)  # delta's are never read
        combined, longest = coordinates + 3 * shape.factor_entries, max(shape.d_out, shape.d_in)
        if self.params.granularity == "tensor":
            return combined + 4 * max(shape.ranks) * longest + 4 * shape.inputs**2
        doubles = (6 * shape.joint_rank + 4 * shape.inputs) * longest + 4 * shape.joint_rank**2
        return combined + doubles + 8 * max(BLOCK_ENTRIES, block_entries(shape))

    def scratch_entries(self, shape: ModuleShape, space: Space) -> int:
        """None for a concatenation."""
        return super().scratch_entries(shape, space) if shape.dense else 0


def _products(block: Tensor, dim: int) -> Tensor:
    """(m, n, n) float64: inner products of n inputs along one dimension of a block (n, rows, columns)."""
    vectors = in_double(block).movedim(dim, -1).transpose(0, 1)
    return vectors @ vectors.mT


def _multiplied(block: Tensor, coefficients: Tensor, dim: int) -> Tensor:
    """(rows, columns): Σ_t c_t x_t of a block (n, rows, columns), with c (m, n) of the vectors along ``dim``."""
    return (block * coefficients.T.to(block).unsqueeze(dim)).sum(dim=0)


def factors_apart(updates: Sequence[LowRankUpdate]) -> tuple[list[LowRankUpdate], list[LowRankUpdate]]:
    """All √|s| · A and all √|s| · B, each as an update itself: zero-padded to the largest rank by a unit factor."""
    rank = max(u.rank for u in updates)
    a, b = [], []
    for update in updates:
        unit = torch.eye(rank, update.rank, dtype=update.b.dtype, device=update.b.device)
        root = math.sqrt(abs(update.scaling))
        a.append(LowRankUpdate(unit, update.a, math.copysign(root, update.scaling)))
        b.append(LowRankUpdate(update.b, unit.T, root))
    return a, b


def row_grams(updates: Sequence[LowRankUpdate]) -> Iterator[Tensor]:
    """The Gram matrix of the n rows i of the deltas for every i, in float64: blocks (rows, n, n), in order.

    Row i of ΔW_t is s_t b_t[i] a_t, so <row i of ΔW_s, row i of ΔW_t> = s_s s_t b_s[i] (a_s a_tᵀ) b_t[i]ᵀ.
    """
    ranks = [u.rank for u in updates]
    a = torch.cat([in_double(u.a) * u.scaling for u in updates])
    products = torch.split(a @ a.T, ranks)
    shape = ModuleShape(*updates[0].shape, tuple(ranks))
    step = max(1, BLOCK_ENTRIES // block_entries(shape))
    for start in range(0, shape.d_out, step):
        b = torch.cat([in_double(u.b[start : start + step]) for u in updates], dim=1)
        pairs = ((own @ product) * b for own, product in zip(torch.split(b, ranks, dim=1), products, strict=True))
        rows = [torch.stack([p.sum(dim=1) for p in torch.split(pair, ranks, dim=1)], dim=1) for pair in pairs]
        yield torch.stack(rows, dim=1)


def block_entries(shape: ModuleShape) -> int:
    """What one row takes in ``row_grams``: R and n² numbers in float64, which count twice."""
    return 2 * (shape.joint_rank + shape.inputs**2)


def lengths_and_cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(…, n) norms and (…, n, n) cosines of the angles between all pairs, within [-1, 1]; 0 where one is zero."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return lengths, over(gram, lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp(-1, 1)


def over(x: Tensor, y: Tensor) -> Tensor:
    """The quotient x / y; 0 where y is 0."""
    return torch.where(y == 0, 0, x / torch.where(y == 0, 1, y))
