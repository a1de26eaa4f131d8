"""What one input adds to one module: an update, low-rank or dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["DenseUpdate", "LowRankUpdate", "Update", "concatenate", "converted", "densify", "padded_stacks"]


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

    def scaled(self, factor: float) -> DenseUpdate:
        """The update times ``factor``."""
        return self if factor == 1.0 else DenseUpdate(self.delta * factor)

    def transposed(self) -> DenseUpdate:
        """The update of the transposed module (a view)."""
        return DenseUpdate(self.delta.T)


Update: TypeAlias = LowRankUpdate | DenseUpdate


def densify(update: Update) -> Tensor:
    """The (d_out, d_in) delta of an update. For tests and small matrices; no merge needs it for low-rank inputs."""
    return update.delta if isinstance(update, DenseUpdate) else (update.b @ update.a) * update.scaling


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


def converted(updates: Sequence[LowRankUpdate], dtype: torch.dtype) -> list[LowRankUpdate]:
    """The updates in ``dtype``, factors of one shape as slices of one stack; those already in it are shared."""
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
