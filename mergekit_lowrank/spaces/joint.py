"""``joint``: the coordinates of every update in the singular directions of all updates together (KnOTS, DRM)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import (
    DenseJointDecomposition,
    DenseUpdate,
    InputUpdate,
    JointDecomposition,
    LowRankUpdate,
    are_low_rank,
    dense_joint_decomposition,
    empty,
    joint_decomposition,
)
from mergekit_lowrank.lowrank.dense_joint import GRAM_BLOCK_ENTRIES
from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space, SpaceParams, with_weights

__all__ = ["JointCoordinates", "JointParams", "JointSpace"]

EIGH_COPIES = 8
"""Gram matrix, eigenvectors and twice as much workspace, all in float64, which counts twice."""
GRAM_COPIES = 10
"""Blocks of the stack: in their type, in float64, their product, turned, squared."""


class JointParams(SpaceParams):
    """How the updates are stacked and which directions count."""

    direction: Literal["horizontal", "vertical"] = Field(
        "horizontal",
        description="horizontal: the updates side by side, which share their output directions; "
        "vertical: on top of each other, which share their input directions",
    )
    rank_tolerance: float = Field(
        1e-5, ge=0, lt=1, description="joint singular values not above this share of the largest are cut"
    )


class JointCoordinates(Coordinates):
    """[ΔW_1 … ΔW_N] = U · diag(S) · [V_1ᵀ … V_Nᵀ]; the coordinates of input t are diag(S) · V_tᵀ, (k, d_in).

    ``vertical`` is the same for the transposed updates.

    Attributes:
        joint: the decomposition (of the transposed updates when vertical).
    """

    joint: JointDecomposition | DenseJointDecomposition

    @abstractmethod
    def part(self, row_scale: Tensor) -> Part:
        """The blocks diag(row_scale[t]) · V_tᵀ as a part.

        Args:
            row_scale: (N, k); S for every t gives the coordinates themselves.
        """


class LowRankJointCoordinates(JointCoordinates):
    """Those of low-rank updates, from R × R products."""

    joint: JointDecomposition

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float], params: JointParams) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        self._vertical = params.direction == "vertical"
        oriented = [u.transposed() for u in updates] if self._vertical else updates
        self.joint = joint_decomposition(oriented, params.rank_tolerance)
        self.parts = (self.part(self.joint.singular_values.expand(len(oriented), -1)),)

    def part(self, row_scale: Tensor) -> Part:
        """Blocks of columns, multiplied out as they are read."""
        cores = self.joint.right_cores * row_scale.unsqueeze(2)
        bases = self.joint.right_bases
        shape = (cores.shape[1], bases.shape[2])
        sizes = (shape[0] * shape[1],) * cores.shape[0]

        def columns(where: slice) -> Tensor:
            return torch.bmm(cores, bases[:, :, where])

        return Part("joint", shape, self.weights, sizes, 1, cores.dtype, cores.device, columns, is_computed=True)

    def decode(self, merged: Sequence[Tensor]) -> LowRankUpdate:
        """U · merged: an adapter of rank k already."""
        update = LowRankUpdate(self.joint.left, merged[0])
        return update.transposed() if self._vertical else update


class DenseJointCoordinates(JointCoordinates):
    """Those of updates of which any is dense: held, on disk within ``scratch_space``."""

    joint: DenseJointDecomposition

    def __init__(self, updates: Sequence[InputUpdate], weights: Sequence[float], params: JointParams) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        self._vertical = params.direction == "vertical"
        self.joint = dense_joint_decomposition(updates, params.rank_tolerance, vertical=self._vertical)
        self.parts = (Part.stacked("joint", self.joint.coordinates, self.weights),)

    def part(self, row_scale: Tensor) -> Part:
        """Blocks of rows of the coordinates, divided by S and scaled as they are read."""
        coordinates = self.joint.coordinates
        factors = (row_scale / self.joint.singular_values).unsqueeze(2)
        return replace(self.parts[0], read=lambda rows: coordinates[:, rows] * factors[:, rows], is_computed=True)

    def decode(self, merged: Sequence[Tensor]) -> DenseUpdate:
        """U · merged, multiplied out."""
        left, right = (merged[0].T, self.joint.left.T) if self._vertical else (self.joint.left, merged[0])
        delta = empty((left.shape[0], right.shape[1]), left.dtype, left.device)
        return DenseUpdate(torch.mm(left, right, out=delta))


class JointSpace(Space):
    """Coordinates in the joint singular directions."""

    name = "joint"
    summary = "S·V_tᵀ of the joint SVD of all updates, from R×R products (KnOTS, DRM)"
    Params = JointParams
    params: JointParams

    takes_dense = True

    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> JointCoordinates:
        """The joint decomposition; its right blocks are read on demand where all updates have factors, else held."""
        if are_low_rank(updates):
            return LowRankJointCoordinates(updates, weights, self.params)
        return DenseJointCoordinates(updates, weights, self.params)

    def reweighted(self, coordinates: Coordinates, weights: Sequence[float]) -> Coordinates:
        """The same decomposition: it does not depend on weights."""
        return with_weights(coordinates, weights)

    def working_entries(self, shape: ModuleShape) -> int:
        """Stacked factors and their bases, the merged coordinates, one block of column slices.

        Of dense inputs: the stack and what is made of it, the Gram matrix with its diagonalisation, blocks in float64.
        """
        if shape.dense:
            return self._dense_entries(shape)
        longest = max(shape.d_out, shape.d_in)
        directions = min(shape.joint_rank, longest)
        stacks = 3 * shape.joint_rank * longest
        padded = 2 * shape.inputs * max(shape.ranks) * (longest + directions)
        block = max(BLOCK_ENTRIES, shape.inputs * directions)
        return stacks + padded + directions * longest + block + 4 * shape.joint_rank**2

    def _dense_entries(self, shape: ModuleShape) -> int:
        rows, columns = self._oriented(shape)
        widest = max(rows, shape.inputs * columns)
        blocks = GRAM_COPIES * max(min(GRAM_BLOCK_ENTRIES, rows * shape.inputs * columns), widest)
        side = min(rows, shape.inputs * columns)
        return self.scratch_entries(shape) + EIGH_COPIES * side**2 + blocks + max(BLOCK_ENTRIES, widest)

    def scratch_entries(self, shape: ModuleShape) -> int:
        """Of dense inputs: their stack, U, what is merged, its product with U, once more when it is scaled."""
        if not shape.dense:
            return 0
        rows, columns = self._oriented(shape)
        side = min(rows, shape.inputs * columns)
        coordinates = 0 if side == rows else shape.inputs * side * columns
        return (shape.inputs + 2) * rows * columns + coordinates + side * (rows + columns)

    def _oriented(self, shape: ModuleShape) -> tuple[int, int]:
        """Rows that the updates share, and columns of each."""
        vertical = self.params.direction == "vertical"
        return (shape.d_in, shape.d_out) if vertical else (shape.d_out, shape.d_in)
