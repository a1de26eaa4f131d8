"""``joint``: the coordinates of every update in the singular directions of all updates together (KnOTS, DRM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, joint_decomposition
from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space, SpaceParams

__all__ = ["JointCoordinates", "JointParams", "JointSpace"]


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

    def __init__(self, updates: Sequence[LowRankUpdate], weights: Sequence[float], params: JointParams) -> None:
        self.updates, self.weights = tuple(updates), tuple(weights)
        self._vertical = params.direction == "vertical"
        oriented = [u.transposed() for u in updates] if self._vertical else self.updates
        self.joint = joint_decomposition(oriented, params.rank_tolerance)
        self.parts = (self.part(self.joint.singular_values.expand(len(oriented), -1)),)

    def part(self, row_scale: Tensor) -> Part:
        """The blocks diag(row_scale[t]) · V_tᵀ as a part.

        Args:
            row_scale: (N, k); S for every t gives the coordinates themselves.
        """
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


class JointSpace(Space):
    """Coordinates in the joint singular directions."""

    name = "joint"
    summary = "S·V_tᵀ of the joint SVD of all updates, from R×R products (KnOTS, DRM)"
    Params = JointParams
    params: JointParams

    def encode(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> JointCoordinates:
        """The joint decomposition, its right blocks read on demand."""
        return JointCoordinates(updates, weights, self.params)

    def working_entries(self, shape: ModuleShape) -> int:
        """Stacked factors and their bases, the merged coordinates, one block of column slices."""
        longest = max(shape.d_out, shape.d_in)
        directions = min(shape.joint_rank, longest)
        stacks = 3 * shape.joint_rank * longest
        padded = 2 * shape.inputs * max(shape.ranks) * (longest + directions)
        block = max(BLOCK_ENTRIES, shape.inputs * directions)
        return stacks + padded + directions * longest + block + 4 * shape.joint_rank**2
