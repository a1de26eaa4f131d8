"""The coordinates a strategy works in, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, Update, order_statistics

__all__ = ["Coordinates", "ModuleShape", "Part", "Space", "SpaceParams"]

BLOCK_ENTRIES = 1 << 19
"""Entries of one block over all inputs (2 MiB in float32, a core's cache): fixed, so that results do not depend on a
memory budget."""
DEVICE_BLOCK_ENTRIES = 1 << 24
"""The same on a GPU (64 MiB): smaller ones would wait for their kernels to start."""


@dataclass(frozen=True)
class ModuleShape:
    """The sizes that decide how much memory a merge of one module needs.

    Attributes:
        d_out: rows of the delta.
        d_in: columns of the delta.
        ranks: of the participating inputs.
    """

    d_out: int
    d_in: int
    ranks: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """Number of participating inputs."""
        return len(self.ranks)

    @property
    def joint_rank(self) -> int:
        """R = Σ r_t."""
        return sum(self.ranks)

    @property
    def factor_entries(self) -> int:
        """Entries of all factors of all inputs."""
        return self.joint_rank * (self.d_out + self.d_in)


@dataclass(frozen=True, eq=False)
class Part:
    """One stack of coordinates: a matrix of equal shape for each of n inputs, read in blocks.

    Attributes:
        name: what it holds: ``delta``, ``joint``, ``core``, ``A`` or ``B``.
        shape: (rows, columns) of one input's matrix.
        weights: n coefficients that belong to this part (in ``factors`` they differ between A and B).
        sizes: n counts of entries that are the input's own, padding left out.
        axis: along which blocks are cut: 0 rows, 1 columns.
        dtype: of the blocks.
        device: of the blocks.
        read: gives the (n, …) block of a slice along ``axis``; called as often as a strategy needs passes. A block may
            be a view of stored coordinates, or of the inputs: it must not be modified unless ``is_computed``.
        shares: n coefficients that a weighted mean divides by; None where they are ``weights``. In ``factors`` the
            weights hold the adapters' scalings, which must not cancel in a mean.
        is_computed: whether each read makes its block anew.
    """

    name: str
    shape: tuple[int, int]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    device: torch.device
    read: Callable[[slice], Tensor]
    shares: tuple[float, ...] | None = None
    is_computed: bool = False

    @classmethod
    def stacked(
        cls,
        name: str,
        stack: Tensor,
        weights: Sequence[float],
        sizes: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
    ) -> Part:
        """A part whose coordinates (n, rows, columns) are held in memory."""
        shape = (stack.shape[1], stack.shape[2])
        return cls(
            name=name,
            shape=shape,
            weights=tuple(weights),
            sizes=tuple(sizes) if sizes is not None else (shape[0] * shape[1],) * stack.shape[0],
            axis=0,
            dtype=stack.dtype,
            device=stack.device,
            read=lambda rows: stack[:, rows],
            shares=tuple(shares) if shares is not None else None,
        )

    @property
    def inputs(self) -> int:
        """N."""
        return len(self.weights)

    @property
    def entries(self) -> int:
        """Entries of one input's matrix, padding included."""
        return self.shape[0] * self.shape[1]

    def slices(self) -> list[slice]:
        """The block boundaries along ``axis``; they depend on the shapes, and on whether this is a CPU, only."""
        length, other = self.shape[self.axis], self.shape[1 - self.axis]
        entries = BLOCK_ENTRIES if self.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
        width = max(1, entries // max(1, self.inputs * other))
        return [slice(start, min(start + width, length)) for start in range(0, length, width)]

    def blocks(self, step: int = 1) -> Iterator[Tensor]:
        """The coordinates in order, each block (n, …); with ``step`` only every so many-th block."""
        return map(self.read, self.slices()[::step])

    def own(self, block: Tensor) -> Tensor:
        """A block as memory of its own, which may be overwritten."""
        return block if self.is_computed else block.clone(memory_format=torch.contiguous_format)

    def magnitudes(self, step: int = 1) -> Iterator[Tensor]:
        """|x| in place of the coordinates, otherwise as ``blocks``."""
        return (block.abs_() if self.is_computed else block.abs() for block in self.blocks(step))

    def magnitudes_at(self, ranks: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """For each input the magnitudes of its ranks, counted from the smallest (1-indexed), exactly; 0.0 for rank 0.

        Padding counts among the entries, as zeros.
        """
        return order_statistics(self.magnitudes, ranks, self.entries, self.dtype)

    def merged(self, merge: Callable[[Tensor], Tensor]) -> Tensor:
        """(rows, columns): ``merge`` applied to each block, (n, …) → (…), and put together."""
        result = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for where in self.slices():
            target = result[where] if self.axis == 0 else result[:, where]
            merged = merge(self.read(where))
            if merged.shape != target.shape:
                raise StrategyError(
                    f"a merged block has the shape {tuple(merged.shape)}; expected {tuple(target.shape)}"
                )
            target.copy_(merged)
        return result


class Coordinates(ABC):
    """The updates of one module in one space.

    Attributes:
        updates: as they were given; shared, not copied.
        weights: the recipe's coefficients of the inputs.
        parts: what element-wise strategies merge, one after the other.
        is_linear: whether Σ w_t · (coordinates of ΔW_t) decode to Σ w_t ΔW_t.
    """

    updates: tuple[LowRankUpdate, ...]
    weights: tuple[float, ...]
    parts: tuple[Part, ...]
    is_linear: ClassVar[bool] = True

    @abstractmethod
    def decode(self, merged: Sequence[Tensor]) -> Update:
        """The update whose coordinates are ``merged``, one (rows, columns) matrix for each part."""


class SpaceParams(BaseModel):
    """Parameters of a space; a recipe gives them beside those of the strategy."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Space(ABC):
    """Turns the updates of one module into coordinates.

    Class attributes:
        name: as recipes call it.
        summary: one sentence.
        Params: its parameters; names must not clash with those of strategies.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Params: ClassVar[type[SpaceParams]] = SpaceParams

    def __init__(self, params: SpaceParams) -> None:
        self.params = params

    @abstractmethod
    def encode(self, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Coordinates:
        """The coordinates of n updates of one module.

        Args:
            updates: on one device, in one floating-point type of at least 32 bits.
            weights: the recipe's coefficients; the space decides where they enter.
        """

    def merged_rank(self, shape: ModuleShape) -> int:
        """An upper bound of the rank of a merged update."""
        return min(shape.joint_rank, shape.d_out, shape.d_in)

    @abstractmethod
    def working_entries(self, shape: ModuleShape) -> int:
        """Upper estimate of the numbers held at once for coordinates, the merged result included, inputs apart."""
