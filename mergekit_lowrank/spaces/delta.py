"""``delta``: the entries of ΔW itself, made on the fly in row blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import DenseUpdate, InputUpdate, LowRankUpdate, are_low_rank, padded_stacks
from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space, with_weights

__all__ = ["READ_COPIES", "DeltaCoordinates", "DeltaSpace"]

READ_COPIES = 4
"""Rows of one dense update that are held at once while they are read: those of W and W0, both converted, the smaller of
them stored."""


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


def _rows_read(updates: Sequence[InputUpdate], where: slice) -> Tensor:
    """The (n, rows, d_in) block where not all updates have factors."""
    first = updates[0]
    block = torch.empty(len(updates), where.stop - where.start, first.shape[1], dtype=first.dtype, device=first.device)
    for target, update in zip(block, updates, strict=True):
        target.copy_(update.rows(where))
    return block


class DeltaCoordinates(Coordinates):
    """Rows of s_t · b_t · a_t, or of a dense update as it is read; nothing of size n × d_out × d_in is ever held."""

    def __init__(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        first = self.updates[0]
        entries = first.shape[0] * first.shape[1]
        sizes = (entries,) * len(self.updates)
        rows = _Rows(self.updates) if are_low_rank(self.updates) else partial(_rows_read, self.updates)
        self.parts = (
            Part("delta", first.shape, self.weights, sizes, 0, first.dtype, first.device, rows, is_computed=True),
        )

    def decode(self, merged: Sequence[Tensor]) -> DenseUpdate:
        """The merged matrix is the update."""
        return DenseUpdate(merged[0])


class DeltaSpace(Space):
    """Coordinates are the entries of the delta."""

    name = "delta"
    summary = "the entries of ΔW = s·B·A, made in row blocks; the result is dense and is then cut to a rank"

    takes_dense = True

    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> DeltaCoordinates:
        """Coordinates that read blocks of rows on demand."""
        return DeltaCoordinates(updates, weights)

    def reweighted(self, coordinates: Coordinates, weights: Sequence[float]) -> Coordinates:
        """The same rows: they do not depend on weights."""
        return with_weights(coordinates, weights)

    def merged_rank(self, shape: ModuleShape) -> int:
        """A dense result may have full rank."""
        return min(shape.d_out, shape.d_in)

    def working_entries(self, shape: ModuleShape) -> int:
        """The merged matrix, once more when it is scaled, one block, and stacked factors or the rows of one update."""
        block = max(BLOCK_ENTRIES, shape.inputs * shape.d_in)
        stacks = 2 * shape.inputs * max(shape.ranks) * (shape.d_out + shape.d_in)
        # A block, what is made of it, and with it what is read for it: of a single input as large.
        return self.scratch_entries(shape) + 2 * block + (READ_COPIES * block if shape.dense else stacks)

    def scratch_entries(self, shape: ModuleShape) -> int:
        """The merged matrix, and once more when it is scaled."""
        return 2 * shape.d_out * shape.d_in
