"""``delta``: the entries of ΔW itself, made on the fly in row blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, padded_stacks
from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space

__all__ = ["DeltaCoordinates", "DeltaSpace"]


class _Rows:
    """Makes blocks of rows. It holds the updates, not the coordinates: a cycle would keep them until a collection."""

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        self._updates = updates

    @cached_property
    def _stacks(self) -> tuple[Tensor, Tensor]:
        """Scaled b (n, d_out, r) and a (n, r, d_in), made when the first block is read: ``linear`` reads none."""
        b, a = padded_stacks(self._updates)
        scalings = torch.tensor([u.scaling for u in self._updates], dtype=b.dtype, device=b.device)
        return b * scalings.view(-1, 1, 1), a

    def __call__(self, rows: slice) -> Tensor:
        """The (n, rows, d_in) block."""
        b, a = self._stacks
        return torch.bmm(b[:, rows], a)


class DeltaCoordinates(Coordinates):
    """Rows of s_t · b_t · a_t; nothing of size n × d_out × d_in is ever held."""

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        first = self.updates[0]
        entries = first.shape[0] * first.shape[1]
        sizes = (entries,) * len(self.updates)
        rows = _Rows(self.updates)
        dtype, device = first.b.dtype, first.b.device
        self.parts = (Part("delta", first.shape, self.weights, sizes, 0, dtype, device, rows, is_computed=True),)

    def decode(self, merged: Sequence[Tensor]) -> DenseUpdate:
        """The merged matrix is the update."""
        return DenseUpdate(merged[0])


class DeltaSpace(Space):
    """Coordinates are the entries of the delta."""

    name = "delta"
    summary = "the entries of ΔW = s·B·A, made in row blocks; the result is dense and is then cut to a rank"

    def encode(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> DeltaCoordinates:
        """Coordinates that read blocks of rows on demand."""
        return DeltaCoordinates(updates, weights)

    def merged_rank(self, shape: ModuleShape) -> int:
        """A dense result may have full rank."""
        return min(shape.d_out, shape.d_in)

    def working_entries(self, shape: ModuleShape) -> int:
        """The merged matrix, once more when it is scaled, stacked factors and one block."""
        stacks = shape.inputs * max(shape.ranks) * (shape.d_out + shape.d_in)
        return 2 * shape.d_out * shape.d_in + stacks + max(BLOCK_ENTRIES, shape.inputs * shape.d_in)
