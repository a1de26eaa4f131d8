"""Everything decided from headers alone, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mergekit_lowrank.engine.memory import format_bytes
from mergekit_lowrank.engine.ranks import above_accepted, accepted_ranks
from mergekit_lowrank.engine.settings import Group
from mergekit_lowrank.formats import Checkpoint, Factored, Layout, Member, ModelDirectory, ModelLayout
from mergekit_lowrank.pages.cells import cell
from mergekit_lowrank.pages.tables import html_table
from mergekit_lowrank.policies import RankPolicy, ScalePolicy, snapped
from mergekit_lowrank.recipe import Budget, Recipe
from mergekit_lowrank.spaces import ModuleShape

__all__ = ["Fold", "ModulePlan", "Plan"]


@dataclass(frozen=True, eq=False)
class ModulePlan:
    """What will be done to one module.

    Attributes:
        name: in the base model.
        shape: sizes and input ranks.
        participants: indices of the inputs that have it.
        weights: of the participants, renormalised under ``missing: present``.
        total_weight: over all inputs.
        group: method, parameters and space.
        scale: how large the result is made.
        rank: how it is cut.
        peak_bytes: what its merge holds at most in memory.
        scratch_bytes: what it holds in a file on disk beside, since it is too much for the memory allowed; mostly 0.
        stored_bytes: of the inputs' factors.
        layout: of its tensors in an adapter.
        dtype: of its tensors as stored.
    """

    name: str
    shape: ModuleShape
    participants: tuple[int, ...]
    weights: tuple[float, ...]
    total_weight: float
    group: Group
    scale: ScalePolicy
    rank: RankPolicy
    peak_bytes: int
    scratch_bytes: int
    stored_bytes: int
    layout: Layout
    dtype: torch.dtype

    @property
    def is_factored(self) -> bool:
        """Whether an adapter stores it as factors; else it is one tensor, which no rank cuts."""
        return isinstance(self.layout, Factored)

    def bytes_per_rank(self, dtype: torch.dtype) -> int:
        """Bytes of one column of B and one row of A."""
        return (self.shape.d_out + self.shape.d_in) * dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """For ``plan --json``."""
        return {
            "module": self.name,
            "d_out": self.shape.d_out,
            "d_in": self.shape.d_in,
            "participants": list(self.participants),
            "ranks": list(self.shape.ranks),
            "weights": list(self.weights),
            "method": self.group.method,
            "space": self.group.space.name,
            "rank_policy": self.rank.name,
            "rank": self.rank.planned,
            "dense_inputs": self.shape.dense,
            "stored_as": type(self.layout).__name__.lower(),
            "peak_bytes": self.peak_bytes,
            "scratch_bytes": self.scratch_bytes,
        }


@dataclass(frozen=True, eq=False)
class Fold:
    """Where the merged updates go when they are added to the base.

    Attributes:
        base: the model directory.
        keys: the tensor of each module, by the module's name.
        layout: the files to be written.
    """

    base: ModelDirectory
    keys: Mapping[str, str]
    layout: ModelLayout

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's tensors, each read once."""
        return sum(spec.stored_bytes for spec in self.base.source.specs.values())

    @cached_property
    def tied(self) -> frozenset[str]:
        """Tensors that change because one does that they are tied to."""
        return frozenset(partner for key in self.keys.values() for partner in self.base.partners(key))

    @cached_property
    def copied(self) -> tuple[str, ...]:
        """Tensors that no input changes, in the order of the files."""
        changed = {*self.keys.values(), *self.tied}
        return tuple(key for key in self.base.source.specs if key not in changed)


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge, decided.

    Attributes:
        recipe: as given.
        inputs: opened, headers read.
        modules: in the order of the inputs' files.
        out_dtype: of the stored result.
        compute_dtype: of everything before it is stored.
        uniform_rank: the rank every module is padded to; None where ranks differ or depend on the data.
        memory_bytes: what a merge may hold.
        overhead_bytes: the part of it that is not for modules.
        fold: where the updates are added to the base; None for an adapter.
        base: the base model, where the output or an input needed it.
        tokenizer: the files of the tokenizer to write, by their path in the output.
        warnings: what a user should know; errors under ``--strict``.
    """

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    modules: tuple[ModulePlan, ...]
    out_dtype: torch.dtype
    compute_dtype: torch.dtype
    uniform_rank: int | None
    memory_bytes: int
    overhead_bytes: int
    warnings: tuple[str, ...]
    fold: Fold | None = None
    base: ModelDirectory | None = None
    tokenizer: Mapping[str, Path] = field(default_factory=dict)

    @property
    def folds(self) -> bool:
        """Whether the output is the base with the updates in it."""
        return self.fold is not None

    @property
    def modules_bytes(self) -> int:
        """What the modules in flight may hold together."""
        return self.memory_bytes - self.overhead_bytes

    def module(self, name: str) -> ModulePlan:
        """The module of this name."""
        return self.modules[self.positions[name]]

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """The place of each module among all, by name."""
        return {module.name: index for index, module in enumerate(self.modules)}

    @property
    def base_model(self) -> str | None:
        """The base that the output names: the recipe's, else the first that an input names."""
        return self.recipe.base_model or next((c.base_model for c in self.inputs if c.base_model), None)

    @property
    def bytes_read(self) -> int:
        """Bytes of all factors that will be read once."""
        return sum(module.stored_bytes for module in self.modules)

    @property
    def accepted_ranks(self) -> tuple[int, ...]:
        """Ranks that may be written, ascending; empty for all."""
        return accepted_ranks(self.recipe)

    @property
    def budget_bytes(self) -> int | None:
        """What the merged factors may take; None without a budget."""
        rank = self.recipe.output.rank
        return rank.bytes if isinstance(rank, Budget) else None

    @property
    def bytes_written(self) -> int | None:
        """Bytes of the merged factors, or of the whole model; None where a rank depends on the data."""
        if self.fold is not None:
            return self.fold.layout.total_bytes
        sizes = [self._written_bytes(module) for module in self.modules]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def _written_bytes(self, module: ModulePlan) -> int | None:
        if not module.is_factored:
            return module.shape.d_out * module.shape.d_in * module.dtype.itemsize
        rank = self.written_rank(module)
        return None if rank is None else rank * module.bytes_per_rank(self.out_dtype)

    @property
    def peak_bytes(self) -> int:
        """What the largest module holds at most: the least memory that the merge needs."""
        return max(module.peak_bytes for module in self.modules)

    def written_rank(self, module: ModulePlan) -> int | None:
        """Rows of A as written, where known; 0 of a tensor without factors."""
        if not module.is_factored:
            return 0
        if self.recipe.output.uniform_rank:
            return self.uniform_rank
        planned = module.rank.planned
        return None if planned is None else self.accepted(planned, module.name)

    def members(self, ranks: Mapping[str, int]) -> list[Member]:
        """Every module as it is written, given its rank."""
        return [Member(m.name, m.layout, m.shape.d_out, m.shape.d_in, ranks[m.name]) for m in self.modules]

    def accepted(self, rank: int, module: str) -> int:
        """The least rank of at least 1 that may be written and holds ``rank`` directions of ``module``.

        Raises:
            RecipeError: every one that may be written is smaller.
        """
        found = snapped(max(1, rank), self.accepted_ranks)
        if found is None:
            raise above_accepted(self.recipe, rank, f"'{module}'")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "kind": self.recipe.output.kind,
            "inputs": [
                {"label": c.label, "location": c.location, "base_model": c.base_model, "modules": len(c.modules)}
                for c in self.inputs
            ],
            "modules": [module.to_dict() | {"written_rank": self.written_rank(module)} for module in self.modules],
            "totals": {
                "modules": len(self.modules),
                "bytes_read": self.bytes_read,
                "bytes_written": self.bytes_written,
                "budget_bytes": self.budget_bytes,
                "peak_bytes": self.peak_bytes,
                "overhead_bytes": self.overhead_bytes,
                "memory_bytes": self.memory_bytes,
            },
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "out_dtype": str(self.out_dtype).removeprefix("torch."),
            "accepted_ranks": list(self.accepted_ranks),
            "uniform_rank": self.uniform_rank,
            "warnings": list(self.warnings),
        }

    def _repr_html_(self) -> str:
        """For notebooks: the facts, and inputs and modules to unfold."""
        inputs = [(c.label, c.location, c.base_model or "not named", len(c.modules)) for c in self.inputs]
        columns = ("module", "out", "in", "inputs", "ranks", "method", "space", "rank", "peak")
        right = ("out", "in", "inputs", "rank", "peak")
        return cell(
            f"Plan of a merge with {self.recipe.merge_method}",
            self._facts(),
            {
                f"{len(inputs)} inputs": html_table(("input", "location", "base model", "modules"), inputs),
                f"{len(self.modules)} modules": html_table(columns, map(self._row, self.modules), right=right),
            },
        )

    def _facts(self) -> Iterator[tuple[str, object]]:
        compute, out = (str(dtype).removeprefix("torch.") for dtype in (self.compute_dtype, self.out_dtype))
        written = "depends on the data" if self.bytes_written is None else format_bytes(self.bytes_written)
        yield "output", self.recipe.output.kind
        yield "base model", self.base_model or "not named"
        yield "reads", format_bytes(self.bytes_read)
        yield "writes", written
        yield "types", f"computes in {compute}, stores {out}"
        yield "memory", f"{format_bytes(self.peak_bytes)} for the largest module"
        yield from (("warning", warning) for warning in self.warnings)

    def _row(self, module: ModulePlan) -> tuple[object, ...]:
        rank, group = self.written_rank(module), module.group
        return (
            module.name,
            module.shape.d_out,
            module.shape.d_in,
            len(module.participants),
            ", ".join(map(str, module.shape.ranks)),
            group.method,
            group.space.name,
            "from the data" if rank is None else rank,
            format_bytes(module.peak_bytes),
        )
