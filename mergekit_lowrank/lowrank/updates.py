"""What one input adds to one module: an update, low-rank or dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import scratch

__all__ = [
    "DenseUpdate",
    "InputUpdate",
    "LowRankUpdate",
    "StreamedUpdate",
    "Update",
    "are_low_rank",
    "blocks_of_rows",
    "concatenate",
    "converted",
    "densify",
    "low_rank",
    "padded_stacks",
]

READ_ENTRIES = 1 << 19
"""Entries of a dense update that are read at once where it is copied."""


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """ΔW = scaling · b · a, never multiplied out.

    Attributes:
        b: (d_out, r), PEFT's ``lora_B``.
        a: (r, d_in), PEFT's ``lora_A``.
        scaling: α/r, α/√r or 1; kept apart from the factors so that they can come back bit for bit.
    """

    b: Tensor
    a: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of ``b``; an upper bound of the rank of the delta."""
        return self.b.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the delta."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return self.b.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.b.device

    def rows(self, where: slice) -> Tensor:
        """(rows, d_in): these rows of the delta, multiplied out."""
        return (self.b[where] @ self.a).mul_(self.scaling)

    def scaled(self, factor: float) -> LowRankUpdate:
        """The update times ``factor``; the factors themselves are shared, not copied."""
        return replace(self, scaling=self.scaling * factor)

    def transposed(self) -> LowRankUpdate:
        """The update of the transposed module: ΔWᵀ = scaling · aᵀ · bᵀ (views)."""
        return LowRankUpdate(self.a.T, self.b.T, self.scaling)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankUpdate:
        """The update on ``device`` in ``dtype``; tensors that are already there are shared."""
        return replace(
            self,
            b=self.b.to(device=device, dtype=dtype, non_blocking=True),
            a=self.a.to(device=device, dtype=dtype, non_blocking=True),
        )


@dataclass(frozen=True, eq=False)
class DenseUpdate:
    """ΔW as a whole matrix: the result of an element-wise merge in ``delta`` space.

    Attributes:
        delta: (d_out, d_in).
    """

    delta: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the delta."""
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix."""
        return self.delta.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.delta.device

    def rows(self, where: slice) -> Tensor:
        """(rows, d_in): a view."""
        return self.delta[where]

    def scaled(self, factor: float) -> DenseUpdate:
        """The update times ``factor``, in scratch space where that is active."""
        if factor == 1.0:
            return self
        return DenseUpdate(torch.mul(self.delta, factor, out=scratch.empty(self.shape, self.dtype, self.device)))

    def transposed(self) -> DenseUpdate:
        """The update of the transposed module (a view)."""
        return DenseUpdate(self.delta.T)


@dataclass(frozen=True, eq=False)
class StreamedUpdate:
    """A dense ΔW that is not in memory, such as W − W0 of a full fine-tune: rows are made when they are asked for.

    Attributes:
        shape: (d_out, d_in).
        dtype: of the rows.
        device: of the rows.
        read: gives rows of the matrix as new memory, which may be overwritten; called as often as passes are needed.
        scaling: ΔW is the matrix times this.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    read: Callable[[slice], Tensor]
    scaling: float = 1.0

    @classmethod
    def of(cls, delta: Tensor) -> StreamedUpdate:
        """That of a matrix (d_out, d_in) in memory, which is not copied."""
        return cls((delta.shape[0], delta.shape[1]), delta.dtype, delta.device, lambda where: delta[where].clone())

    def rows(self, where: slice) -> Tensor:
        """(rows, d_in): these rows of the delta, new each time."""
        rows = self.read(where)
        return rows if self.scaling == 1.0 else rows.mul_(self.scaling)

    def scaled(self, factor: float) -> StreamedUpdate:
        """The update times ``factor``; nothing is read."""
        return replace(self, scaling=self.scaling * factor)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> StreamedUpdate:
        """The update on ``device`` in ``dtype``: rows are moved as they are read."""
        there, read = torch.device(device), self.read
        return replace(self, device=there, dtype=dtype, read=lambda where: read(where).to(device=there, dtype=dtype))


Update: TypeAlias = LowRankUpdate | DenseUpdate | StreamedUpdate
InputUpdate: TypeAlias = LowRankUpdate | StreamedUpdate


def are_low_rank(updates: Sequence[Update]) -> TypeGuard[Sequence[LowRankUpdate]]:
    """Whether none of the updates is dense."""
    return all(isinstance(update, LowRankUpdate) for update in updates)


def low_rank(updates: Sequence[InputUpdate], who: str) -> Sequence[LowRankUpdate]:
    """The updates, none of them dense: for methods and spaces that work on factors.

    Raises:
        StrategyError: one is. The plan refuses it before, by ``takes_dense``.
    """
    if are_low_rank(updates):
        return updates
    dense = [t for t, update in enumerate(updates) if not isinstance(update, LowRankUpdate)]
    raise StrategyError(
        f"'{who}' works on the factors of low-rank updates; of the module's inputs {dense} are dense (full "
        "fine-tunes); use a method and a space that take these, such as linear, ties or drm"
    )


def blocks_of_rows(shape: tuple[int, int], entries: int) -> list[slice]:
    """Consecutive slices of the rows of a matrix (rows, columns), of at most ``entries`` entries or one row each."""
    width = max(1, entries // max(1, shape[1]))
    return [slice(start, min(start + width, shape[0])) for start in range(0, shape[0], width)]


def densify(update: Update) -> Tensor:
    """The (d_out, d_in) delta of an update, in scratch space where that is active. No merge needs it."""
    match update:
        case DenseUpdate():
            return update.delta
        case StreamedUpdate():
            delta = scratch.empty(update.shape, update.dtype, update.device)
            for where in blocks_of_rows(update.shape, READ_ENTRIES):
                delta[where] = update.rows(where)
            return delta
        case LowRankUpdate():
            return (update.b @ update.a) * update.scaling


def concatenate(updates: Sequence[LowRankUpdate], coefficients: Sequence[float]) -> LowRankUpdate:
    """Σ_t c_t ΔW_t as one update of rank Σ r_t: [c_t s_t b_t] · [a_t], exact, nothing multiplied out.

    A single update is returned with its factors untouched and the coefficient in ``scaling``.
    """
    if len(updates) == 1:
        return updates[0].scaled(coefficients[0])
    b = torch.cat([u.b * (u.scaling * c) for u, c in zip(updates, coefficients, strict=True)], dim=1)
    return LowRankUpdate(b, torch.cat([u.a for u in updates]))


def padded_stacks(updates: Sequence[LowRankUpdate]) -> tuple[Tensor, Tensor]:
    """Both factors of n updates as stacks (n, d_out, r) and (n, r, d_in), zero-padded to the largest rank r.

    Views where the factors lie one behind the other, as ``converted`` leaves them, else copies; not to be written to.
    """
    rank = max(u.rank for u in updates)
    missing = [rank - u.rank for u in updates]
    b = [pad(u.b, (0, more)) if more else u.b for u, more in zip(updates, missing, strict=True)]
    a = [pad(u.a, (0, 0, 0, more)) if more else u.a for u, more in zip(updates, missing, strict=True)]
    return _stack(b), _stack(a)


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    """(n, …); a view where the matrices are already slices of one stack, in order."""
    first, size = matrices[0], matrices[0].numel()
    storage = first.untyped_storage().data_ptr()
    places = [first.storage_offset() + t * size for t in range(len(matrices))]
    if all(
        m.is_contiguous() and m.untyped_storage().data_ptr() == storage and m.storage_offset() == place
        for m, place in zip(matrices, places, strict=True)
    ):
        return first.as_strided((len(matrices), *first.shape), (size, *first.stride()), places[0])
    return torch.stack([*matrices])


def converted(updates: Sequence[InputUpdate], dtype: torch.dtype) -> list[InputUpdate]:
    """The updates in ``dtype``, factors of one shape as slices of one stack; those already in it are shared."""
    if not are_low_rank(updates):
        return [update.to(update.device, dtype) for update in updates]
    if len({(u.b.shape, u.a.shape) for u in updates}) > 1 or any(u.b.dtype == dtype == u.a.dtype for u in updates):
        return [update.to(update.b.device, dtype) for update in updates]
    b, a = (
        factors[0].new_empty((len(factors), *factors[0].shape), dtype=dtype)
        for factors in ([u.b for u in updates], [u.a for u in updates])
    )
    for update, own_b, own_a in zip(updates, b, a, strict=True):
        own_b.copy_(update.b)
        own_a.copy_(update.a)
    return [LowRankUpdate(own_b, own_a, u.scaling) for u, own_b, own_a in zip(updates, b, a, strict=True)]
