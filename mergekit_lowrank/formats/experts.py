"""Factors of fused experts, under the names and in the shapes of the base's parameters (E, …)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.base import Checkpoint, Derived, ModuleHeader
from mergekit_lowrank.formats.layouts import Expert
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate

__all__ = ["FusedExperts"]


class FusedExperts(Derived):
    """An adapter whose experts are one dense module for each fused parameter, merged as those of fine-tunes are.

    An adapter does not name the parameter of each pair of factors (peft nests them), so it is told by its shape.

    Args:
        adapter: with modules of fused experts.
        base: whose parameters they change.
        dtype: of the rows of its updates.

    Raises:
        CheckpointError: no parameter of the base has the shape, or more than one.
    """

    def __init__(self, adapter: Checkpoint, base: ModelDirectory, dtype: torch.dtype) -> None:
        super().__init__(adapter)
        self._dtype = dtype
        paths: dict[str, list[str]] = {}
        for name, header in adapter.modules.items():
            if isinstance(header.layout, Expert):
                paths.setdefault(header.layout.path, []).append(name)
        fused = [_Fused.of(adapter, path, members, base) for path, members in paths.items()]
        self._fused = {own.key: own for own in fused}
        members = {name for own in fused for name in own.members}
        modules = {name: header for name, header in adapter.modules.items() if name not in members}
        self.modules: Mapping[str, ModuleHeader] = {**modules, **{own.key: own.header(adapter) for own in fused}}

    @classmethod
    def of(cls, adapter: Checkpoint, base: ModelDirectory, dtype: torch.dtype) -> Checkpoint:
        """The adapter as this, or as it is where it has no fused experts."""
        has_any = any(isinstance(header.layout, Expert) for header in adapter.modules.values())
        return cls(adapter, base, dtype) if has_any else adapter

    def read(self, module: str) -> InputUpdate:
        """The update of one module; of fused experts a row for each, made when it is asked for."""
        own = self._fused.get(module)
        if own is None:
            return self.origin.read(module)
        header = self.modules[module]
        rows = _Rows(self.origin, own, self._dtype)
        return StreamedUpdate((header.d_out, header.d_in), self._dtype, torch.device("cpu"), rows)


@dataclass(frozen=True)
class _Fused:
    """One parameter of the base.

    Attributes:
        key: its name.
        members: the modules of its experts.
        is_transposed: whether it is stored as (E, in, out).
    """

    key: str
    members: tuple[str, ...]
    is_transposed: bool

    @classmethod
    def of(cls, adapter: Checkpoint, path: str, members: list[str], base: ModelDirectory) -> _Fused:
        """The parameter of the module at ``path`` that has the shape of its factors."""
        first = adapter.modules[members[0]]
        holder = re.sub(r"(\.base_layer)+$", "", path)
        shapes = {False: (first.d_out, first.d_in), True: (first.d_in, first.d_out)}
        found = [
            (key, transposed)
            for key, spec in base.source.specs.items()
            for transposed, shape in shapes.items()
            if spec.shape == (len(members), *shape) and f".{key}".endswith(f".{holder}.{key.rpartition('.')[2]}")
        ]
        if len(found) != 1:
            names = ", ".join(f"'{key}'" for key, _ in found) or "none"
            raise CheckpointError(
                f"adapter '{adapter.label}': the {len(members)} experts of '{path}' change a parameter of "
                f"{first.d_out} x {first.d_in}; of the base's, these may be it: {names}. The adapter does not say "
                "which, so exactly one must have the shape: write an adapter instead of a model, or give its own base."
            )
        return cls(found[0][0], tuple(members), found[0][1])

    def header(self, adapter: Checkpoint) -> ModuleHeader:
        """Of the parameter as a matrix (E, rest)."""
        own = [adapter.modules[name] for name in self.members]
        return ModuleHeader(
            name=self.key,
            d_out=len(own),
            d_in=own[0].d_out * own[0].d_in,
            rank=len(own),
            scaling=1.0,
            dtype=own[0].dtype,
            stored_bytes=sum(header.stored_bytes for header in own),
            is_dense=True,
            kind="vector",
        )


@dataclass(frozen=True)
class _Rows:
    """Updates of experts, one a row, as the base stores them."""

    adapter: Checkpoint
    fused: _Fused
    dtype: torch.dtype

    def __call__(self, where: slice) -> Tensor:
        rows = []
        for name in self.fused.members[where]:
            update = self.adapter.read(name)
            assert isinstance(update, LowRankUpdate)  # noqa: S101 - experts have factors
            delta = update.to("cpu", self.dtype).rows(slice(None))
            rows.append((delta.T if self.fused.is_transposed else delta).flatten())
        return torch.stack(rows)
