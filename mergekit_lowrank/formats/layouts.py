"""How the update of a module lies in an adapter's file: which tensors there are, and how they follow from the factors.

A merge sees matrices (d_out, d_in) only. Each layout turns an update of one into PEFT's tensors and back, without a
rounding: by views, transpositions and reshapes.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = [
    "LINEAR",
    "LORA_BIAS",
    "PREFIX",
    "Convolution",
    "Embedding",
    "Expert",
    "Factored",
    "Layout",
    "Linear",
    "Member",
    "TokenRow",
    "Whole",
]

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""
LORA_BIAS = ".lora_B.bias"
"""How the names of biases of ``lora_B`` end."""


@dataclass(frozen=True)
class Member:
    """One module as it is written.

    Attributes:
        module: its name.
        layout: of its tensors.
        d_out: rows of its update.
        d_in: columns of its update.
        rank: of its factors; 0 where there are none.
    """

    module: str
    layout: Layout
    d_out: int
    d_in: int
    rank: int


class Layout(ABC):
    """Of one module, in the tensors of a file. Equal for inputs that store a module alike.

    Modules of one slot share tensors, which are written when all of them are there; most have one of their own.
    """

    def __str__(self) -> str:
        return f"factors of {type(self).__name__.lower()} layers"

    def slot(self, module: str) -> str:
        """What the modules that share tensors have in common."""
        return module

    def targets(self, module: str) -> tuple[str, ...]:
        """What patterns of a configuration call what a module changes.

        Modules with one in common have one rank.
        """
        return (module,)

    @abstractmethod
    def announced(self, members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of one slot, by name."""

    @abstractmethod
    def packed(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, Tensor]:
        """The tensors of one slot, contiguous.

        Args:
            members: all of it.
            updates: factors of the announced ranks with the scaling in b, or (d_out, d_in) matrices.
        """


class Factored(Layout):
    """Of an update that is stored as two factors."""

    @abstractmethod
    def names(self, module: str) -> tuple[str, str]:
        """The names of the tensors, that of A first."""

    @abstractmethod
    def shapes(self, d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the tensors, that of A first."""

    @abstractmethod
    def stored(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """The tensors, that of A first; the scaling is not in them."""

    @abstractmethod
    def update(self, stored_a: Tensor, stored_b: Tensor, scaling: float) -> LowRankUpdate:
        """The update of two stored tensors: views where that is possible."""

    def announced(self, members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
        """Both factors."""
        (own,) = members
        return dict(zip(self.names(own.module), self.shapes(own.d_out, own.d_in, own.rank), strict=True))

    def packed(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, Tensor]:
        """Both factors."""
        (own,), (update,) = members, updates
        assert isinstance(update, LowRankUpdate)  # noqa: S101 - it was cut to a rank
        pairs = zip(self.names(own.module), self.stored(update), strict=True)
        return {name: tensor.contiguous() for name, tensor in pairs}


@dataclass(frozen=True)
class Linear(Factored):
    """``lora_A`` (r, in) and ``lora_B`` (out, r)."""

    def names(self, module: str) -> tuple[str, str]:
        """``<module>.lora_A.weight`` and ``<module>.lora_B.weight``."""
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"

    def shapes(self, d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in) and (out, r)."""
        return (rank, d_in), (d_out, rank)

    def stored(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """The factors themselves."""
        return update.a, update.b

    def update(self, stored_a: Tensor, stored_b: Tensor, scaling: float) -> LowRankUpdate:
        """The factors themselves."""
        return LowRankUpdate(stored_b, stored_a, scaling)


LINEAR = Linear()


@dataclass(frozen=True)
class Embedding(Factored):
    """``lora_embedding_A`` (r, vocab) and ``lora_embedding_B`` (dim, r), of a table (vocab, dim): ΔW = (B·A)ᵀ.

    So b = Aᵀ, the factor that training starts at zero, as in a linear layer.
    """

    def names(self, module: str) -> tuple[str, str]:
        """``<module>.lora_embedding_A`` and ``<module>.lora_embedding_B``."""
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"

    def shapes(self, d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, vocab) and (dim, r)."""
        return (rank, d_out), (d_in, rank)

    def stored(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """Both factors transposed."""
        return update.b.T, update.a.T

    def update(self, stored_a: Tensor, stored_b: Tensor, scaling: float) -> LowRankUpdate:
        """Both factors transposed (views)."""
        return LowRankUpdate(stored_a.T, stored_b.T, scaling)


@dataclass(frozen=True)
class Convolution(Factored):
    """``lora_A`` (r, in, *kernel) and ``lora_B`` (out, r, 1, …), of a weight (out, in, *kernel) seen as (out, in · k).

    Attributes:
        channels: of the input.
        kernel: its sizes, one for each dimension.
    """

    channels: int
    kernel: tuple[int, ...]

    def names(self, module: str) -> tuple[str, str]:
        """As of a linear layer."""
        return LINEAR.names(module)

    def shapes(self, d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in, *kernel) and (out, r, 1, …)."""
        return (rank, self.channels, *self.kernel), (d_out, rank, *(1 for _ in self.kernel))

    def stored(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """The factors in the shapes of kernels."""
        a_shape, b_shape = self.shapes(*update.shape, update.rank)
        return update.a.reshape(a_shape), update.b.reshape(b_shape)

    def update(self, stored_a: Tensor, stored_b: Tensor, scaling: float) -> LowRankUpdate:
        """The factors as matrices (views)."""
        return LowRankUpdate(stored_b.flatten(1), stored_a.flatten(1), scaling)


@dataclass(frozen=True)
class Expert(Factored):
    """One expert of a fused parameter: E of them share ``lora_A`` (E · r, in) and ``lora_B`` (out, r · E).

    B lies as (out, r, E): the experts are its innermost dimension (peft 0.21, ``ParamWrapper``). The factors map inputs
    to outputs, whichever way round the base stores the parameter.

    Attributes:
        path: of the module, as PEFT nests it.
        index: of the expert.
        count: of all.
        parameters: what the configuration calls ``target_parameters``.
    """

    path: str
    index: int
    count: int
    parameters: tuple[str, ...] = ()

    def slot(self, module: str) -> str:
        """The path."""
        return self.path

    def targets(self, module: str) -> tuple[str, ...]:
        """The parameters of the module, whichever of them this is."""
        holder = re.sub(r"(\.base_layer)+$", "", self.path)
        own = (name.rpartition(".") for name in self.parameters)
        return tuple(
            f"{holder}.{parameter}" for target, _, parameter in own if holder == target or holder.endswith(f".{target}")
        ) or (holder,)

    def names(self, module: str) -> tuple[str, str]:
        """As of a linear layer, of all experts."""
        return LINEAR.names(self.path)

    def shapes(self, d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(E · r, in) and (out, r · E)."""
        return (self.count * rank, d_in), (d_out, rank * self.count)

    def stored(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """The factors of this expert."""
        return update.a, update.b

    def update(self, stored_a: Tensor, stored_b: Tensor, scaling: float) -> LowRankUpdate:
        """This expert's part of both tensors: (r, in) as it is, (out, r · E) whole."""
        return LowRankUpdate(stored_b.reshape(len(stored_b), -1, self.count)[:, :, self.index], stored_a, scaling)

    def announced(self, members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
        """Both tensors, at the largest rank."""
        rank = max(own.rank for own in members)
        return dict(zip(self.names(""), self.shapes(members[0].d_out, members[0].d_in, rank), strict=True))

    def packed(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, Tensor]:
        """Both tensors of all experts."""
        rank = max(own.rank for own in members)
        parts = {own.layout.index: _padded(u, rank) for own, u in zip(members, updates, strict=True)}  # type: ignore[attr-defined]
        ordered = [parts[index] for index in range(self.count)]
        stacked = torch.stack([u.b for u in ordered], dim=2)
        return dict(zip(self.names(""), (torch.cat([u.a for u in ordered]), stacked.flatten(1)), strict=True))


@dataclass(frozen=True)
class Whole(Layout):
    """One tensor as it is, no factors.

    Attributes:
        key: its name in the file.
        shape: as stored; merged as (1, d) of a vector, (d_0, rest) of everything else.
        onto: the parameter of the base that the merged values are added to before they are stored; None to store them.
        saved_under: what ``modules_to_save`` calls the module; None where it does not.
        in_side_file: whether it lies in LLaVA's ``non_lora_trainables.bin``.
    """

    key: str
    shape: tuple[int, ...]
    onto: str | None = None
    saved_under: str | None = field(default=None, compare=False)
    in_side_file: bool = False

    def __str__(self) -> str:
        return f"the tensor '{self.key}' {list(self.shape)}"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) as which it is merged."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, math.prod(self.shape) // max(1, rows)

    def announced(self, members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
        """The tensor."""
        return {self.key: self.shape}

    def packed(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, Tensor]:
        """The tensor."""
        (matrix,) = updates
        assert isinstance(matrix, Tensor)  # noqa: S101 - nothing cuts it
        return {self.key: matrix.reshape(self.shape).contiguous()}


@dataclass(frozen=True)
class TokenRow(Layout):
    """One row of an embedding, which PEFT stores with the others that were trained (``trainable_token_indices``).

    Attributes:
        key: the name of the tensor (tokens, dim).
        module: the embedding.
        token: the row's number in it.
        onto: the parameter of the base whose row is added; None to store the values.
    """

    key: str
    module: str
    token: int
    onto: str | None = None

    def __str__(self) -> str:
        return f"row {self.token} of '{self.module}'"

    def slot(self, module: str) -> str:
        """The tensor."""
        return self.key

    def announced(self, members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
        """All rows of the tensor."""
        return {self.key: (len(members), members[0].d_in)}

    def packed(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, Tensor]:
        """The rows in the order of their numbers."""
        pairs = sorted(zip(members, updates, strict=True), key=lambda pair: pair[0].layout.token)  # type: ignore[attr-defined]
        return {self.key: torch.cat([update for _, update in pairs])}  # type: ignore[misc]


def _padded(update: LowRankUpdate | Tensor, rank: int) -> LowRankUpdate:
    """Factors with zeros up to a rank."""
    assert isinstance(update, LowRankUpdate)  # noqa: S101 - it was cut to a rank
    missing = rank - update.rank
    return LowRankUpdate(pad(update.b, (0, missing)), pad(update.a, (0, 0, 0, missing)), update.scaling)
