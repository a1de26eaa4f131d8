"""The coordinates a strategy works in, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import InputUpdate, Update, blocks_of_rows, empty, order_statistics

__all__ = [
    "Coordinates",
    "ModuleShape",
    "Part",
    "Space",
    "SpaceParams",
    "block_entries",
    "device_blocks",
    "with_weights",
]

BLOCK_ENTRIES = 1 << 19
"""Entries of one block over all inputs (2 MiB in float32, a core's cache): fixed, so that results do not depend on a
memory budget."""
DEVICE_BLOCK_ENTRIES = 1 << 24
"""The same on a GPU (64 MiB): smaller ones would wait for their kernels to start."""

_device_block_entries: ContextVar[int] = ContextVar("device_block_entries", default=DEVICE_BLOCK_ENTRIES)


@contextmanager
def device_blocks(entries: int) -> Iterator[None]:
    """Within it, blocks of this thread on a GPU have that many entries, as it ran out of memory; on the CPU never."""
    token = _device_block_entries.set(entries)
    try:
        yield
    finally:
        _device_block_entries.reset(token)


def block_entries(device: torch.device) -> int:
    """Entries of one block over all inputs on ``device``."""
    return BLOCK_ENTRIES if device.type == "cpu" else _device_block_entries.get()


@dataclass(frozen=True)
class ModuleShape:
    """The sizes that decide how much memory a merge of one module needs.

    Attributes:
        d_out: rows of the delta.
        d_in: columns of the delta.
        ranks: of the participating inputs; that of a dense one is min(d_out, d_in).
        dense: how many of the inputs are dense.
    """

    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    dense: int = 0

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
        """Entries of all factors of all low-rank inputs; dense ones are never held."""
        return (self.joint_rank - self.dense * min(self.d_out, self.d_in)) * (self.d_out + self.d_in)


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
        """The block boundaries along ``axis``; they depend on the shapes only, on a GPU on ``device_blocks`` too."""
        length, other = self.shape[self.axis], self.shape[1 - self.axis]
        return blocks_of_rows((length, self.inputs * other), block_entries(self.device))

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
        """(rows, columns): ``merge`` applied to each block, (n, …) → (…), and put together in ``lowrank.empty``."""
        result = empty(self.shape, self.dtype, self.device)
        for where in self.slices():
            target = result[where] if self.axis == 0 else result[:, where]
            merged = merge(self.read(where))
            if merged.shape != target.shape:
                raise StrategyError(
                    f"a merged block has the shape {tuple(merged.shape)}; expected {tuple(target.shape)}"
                )
            target.copy_(merged)
        return result


CoordinatesT = TypeVar("CoordinatesT", bound="Coordinates")


class Coordinates(ABC):
    """The updates of one module in one space.

    Attributes:
        updates: as they were given, low-rank or read row by row; shared, not copied.
        weights: the recipe's coefficients of the inputs.
        parts: what element-wise strategies merge, one after the other.
        is_linear: whether Σ w_t · (coordinates of ΔW_t) decode to Σ w_t ΔW_t.
    """

    updates: tuple[InputUpdate, ...]
    weights: tuple[float, ...]
    parts: tuple[Part, ...]
    is_linear: ClassVar[bool] = True

    @abstractmethod
    def decode(self, merged: Sequence[Tensor]) -> Update:
        """The update whose coordinates are ``merged``, one (rows, columns) matrix for each part."""


def with_weights(coordinates: CoordinatesT, weights: Sequence[float]) -> CoordinatesT:
    """The same coordinates with other weights, where these enter nothing but ``Part.weights``; all else is shared."""
    other = copy(coordinates)
    other.weights = tuple(weights)
    other.parts = tuple(replace(part, weights=other.weights) for part in coordinates.parts)
    return other


class SpaceParams(BaseModel):
    """Parameters of a space; a recipe gives them beside those of the strategy."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Space(ABC):
    """Turns the updates of one module into coordinates.

    Class attributes:
        name: as recipes call it.
        summary: one sentence.
        Params: its parameters; names must not clash with those of strategies.
        takes_dense: whether inputs may be dense: ``encode`` then gets updates of both kinds.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Params: ClassVar[type[SpaceParams]] = SpaceParams
    takes_dense: ClassVar[bool] = False

    def __init__(self, params: SpaceParams) -> None:
        self.params = params

    @abstractmethod
    def encode(self, updates: Sequence[InputUpdate], weights: Sequence[float]) -> Coordinates:
        """The coordinates of n updates of one module.

        Args:
            updates: on one device, in one floating-point type of at least 32 bits.
            weights: the recipe's coefficients; the space decides where they enter.
        """

    def reweighted(self, coordinates: Coordinates, weights: Sequence[float]) -> Coordinates:
        """The coordinates of the same updates with other weights; what does not depend on weights is shared."""
        return self.encode(coordinates.updates, weights)

    def merged_rank(self, shape: ModuleShape) -> int:
        """An upper bound of the rank of a merged update."""
        return min(shape.joint_rank, shape.d_out, shape.d_in)

    @abstractmethod
    def working_entries(self, shape: ModuleShape) -> int:
        """Upper estimate of the numbers held at once for coordinates, the merged result included, inputs apart."""

    def scratch_entries(self, shape: ModuleShape) -> int:
        """Those of ``working_entries`` that are in matrices of ``lowrank.empty``, which scratch space takes to disk."""
        del shape
        return 0
