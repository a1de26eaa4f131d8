"""Everything decided from headers alone, before any tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lowrank.engine.memory import format_bytes, module_peak_bytes
from mergekit_lowrank.engine.ranks import (
    above_accepted,
    accepted_ranks,
    over_accepted,
    rank_policy,
    under_budget,
    uniform_rank,
)
from mergekit_lowrank.engine.settings import Group, Settings, SettingsResolver
from mergekit_lowrank.errors import (
    IncompatibleInputsError,
    MemoryBudgetError,
    MergeError,
    RecipeError,
    StrategyError,
    raise_together,
)
from mergekit_lowrank.formats import Checkpoint, ModuleHeader
from mergekit_lowrank.policies import RankPolicy, ScalePolicy, snapped
from mergekit_lowrank.recipe import Budget, Depths, Recipe
from mergekit_lowrank.spaces import ModuleShape

__all__ = ["ModulePlan", "Plan", "build_plan"]

SHOWN = 3
"""Examples named in one message; the rest is counted."""


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
        peak_bytes: what its merge holds at most.
        stored_bytes: of the inputs' factors.
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
    stored_bytes: int

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
            "peak_bytes": self.peak_bytes,
        }


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
        warnings: what a user should know; errors under ``--strict``.
    """

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    modules: tuple[ModulePlan, ...]
    out_dtype: torch.dtype
    compute_dtype: torch.dtype
    uniform_rank: int | None
    memory_bytes: int
    warnings: tuple[str, ...]

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
        """Bytes of the merged factors; None where a rank depends on the data."""
        ranks = [self.written_rank(module) for module in self.modules]
        sizes = [module.bytes_per_rank(self.out_dtype) for module in self.modules]
        known = [rank * size for rank, size in zip(ranks, sizes, strict=True) if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    @property
    def peak_bytes(self) -> int:
        """What the largest module holds at most: the least memory that the merge needs."""
        return max(module.peak_bytes for module in self.modules)

    def written_rank(self, module: ModulePlan) -> int | None:
        """Rows of A as written, where known."""
        if self.recipe.output.uniform_rank:
            return self.uniform_rank
        planned = module.rank.planned
        return None if planned is None else self.accepted(planned, module.name)

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
                "memory_bytes": self.memory_bytes,
            },
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "out_dtype": str(self.out_dtype).removeprefix("torch."),
            "accepted_ranks": list(self.accepted_ranks),
            "uniform_rank": self.uniform_rank,
            "warnings": list(self.warnings),
        }


def build_plan(recipe: Recipe, inputs: Sequence[Checkpoint], resolver: SettingsResolver, *, memory_bytes: int) -> Plan:
    """The plan of a merge.

    Args:
        recipe: what to merge.
        inputs: opened, one for each model of the recipe.
        resolver: of this recipe, without problems.
        memory_bytes: what the merge may hold.

    Raises:
        MergeError: every problem of the inputs and the budget, together.
    """
    problems: list[MergeError] = [*_incompatibilities(inputs)]
    raise_together(problems)
    compute, stored = _compute_dtype(recipe, inputs), _out_dtype(recipe, inputs)
    draft = _Draft(recipe, inputs, resolver, compute)
    modules = draft.modules()
    problems += draft.problems
    problems += _unmatched_rules(recipe, resolver)
    problems += _over_memory(modules, memory_bytes)
    problems += over_accepted(recipe, {module.name: module.rank for module in modules})
    problems += under_budget(recipe, [(module.rank, module.bytes_per_rank(stored)) for module in modules])
    raise_together(problems)
    return Plan(
        recipe=recipe,
        inputs=tuple(inputs),
        modules=modules,
        out_dtype=stored,
        compute_dtype=compute,
        uniform_rank=uniform_rank(recipe, [module.rank for module in modules]),
        memory_bytes=memory_bytes,
        warnings=(*_warnings(inputs, modules), *_split_surveys(modules)),
    )


_FACTORS_KEPT = (
    "'{}' needs its factors written as they are: set output.rank: max (or as much as the largest input rank) "
    "and output.balance: false"
)


class _Draft:
    """The modules of a plan in the making."""

    def __init__(
        self, recipe: Recipe, inputs: Sequence[Checkpoint], resolver: SettingsResolver, compute: torch.dtype
    ) -> None:
        self._recipe, self._inputs, self._resolver, self._compute = recipe, inputs, resolver, compute
        self._depths = Depths(_module_names(inputs))
        self._largest_rank = max(header.rank for c in inputs for header in c.modules.values())
        self._failures: dict[tuple[type[MergeError], str], list[str]] = {}

    def modules(self) -> tuple[ModulePlan, ...]:
        planned = [self._module(name) for name in _module_names(self._inputs)]
        return tuple(module for module in planned if module is not None)

    @property
    def problems(self) -> Iterator[MergeError]:
        """What is wrong, once for all the modules it is wrong with."""
        for (kind, message), names in self._failures.items():
            more = f" (and {len(names) - 1} more modules)" if len(names) > 1 else ""
            yield kind(f"module '{names[0]}'{more}: {message}")

    def _module(self, name: str) -> ModulePlan | None:
        participants = tuple(t for t, c in enumerate(self._inputs) if name in c.modules)
        try:
            settings = self._resolver.of(name, self._depths.of(name))
            weights, total = self._participant_weights(name, settings, participants)
            settings.group.strategy.check_weights(weights, total)
        except MergeError as error:
            self._failures.setdefault((type(error), str(error)), []).append(name)
            return None
        headers = [self._inputs[t].modules[name] for t in participants]
        shape = ModuleShape(headers[0].d_out, headers[0].d_in, tuple(h.rank for h in headers))
        rank = rank_policy(settings, shape, self._recipe, self._largest_rank)
        if settings.group.strategy.keeps_factors and not self._keeps_factors(settings.group, shape, rank):
            self._failures.setdefault((StrategyError, _FACTORS_KEPT.format(settings.group.method)), []).append(name)
        stored = sum(header.stored_bytes for header in headers)
        group = settings.group
        peak = module_peak_bytes(
            shape,
            group.strategy,
            group.space,
            stored_bytes=stored,
            rank=rank.planned or group.space.merged_rank(shape),
            compute_bytes=self._compute.itemsize,
            canonical=self._recipe.canonical is not None,
            balanced=self._recipe.output.balance,
        )
        return ModulePlan(name, shape, participants, weights, total, group, settings.scale, rank, peak, stored)

    def _keeps_factors(self, group: Group, shape: ModuleShape, rank: RankPolicy) -> bool:
        needed = group.space.merged_rank(shape)
        return not self._recipe.output.balance and rank.planned is not None and rank.planned >= needed

    def _participant_weights(
        self, name: str, settings: Settings, participants: tuple[int, ...]
    ) -> tuple[tuple[float, ...], float]:
        own = tuple(settings.weights[t] for t in participants)
        total = sum(settings.weights)
        if len(participants) == len(self._inputs) or self._recipe.missing == "zero":
            return own, total
        if self._recipe.missing == "error":
            lacking = ", ".join(f"'{c.label}'" for c in self._inputs if name not in c.modules)
            raise IncompatibleInputsError(f"it is missing in {lacking}, and the recipe says missing: error")
        present = sum(own)
        if present == 0:
            raise RecipeError(
                f"the weights {list(own)} of the inputs that have it sum to 0, so 'missing: present' "
                "cannot renormalise them; use 'missing: zero'"
            )
        return tuple(w * total / present for w in own), total


def _module_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """All modules, in the order of the first input's file, then of the next one's."""
    return list(dict.fromkeys(name for checkpoint in inputs for name in checkpoint.modules))


def _incompatibilities(inputs: Sequence[Checkpoint]) -> Iterator[MergeError]:
    owners = Counter(name for checkpoint in inputs for name in checkpoint.modules)
    for checkpoint in inputs:
        if len(inputs) > 1 and not any(owners[name] > 1 for name in checkpoint.modules):
            other = next(c for c in inputs if c is not checkpoint)
            yield IncompatibleInputsError(
                f"'{checkpoint.label}' shares no module with the other inputs: "
                f"it has '{next(iter(checkpoint.modules))}', '{other.label}' has '{next(iter(other.modules))}'. "
                "Inputs must be adapters of one base model, with the same key prefix; "
                "compare them with `mergekit-lowrank inspect`."
            )
    yield from _shape_conflicts(inputs)


def _shape_conflicts(inputs: Sequence[Checkpoint]) -> Iterator[MergeError]:
    first: dict[str, tuple[Checkpoint, ModuleHeader]] = {}
    conflicts: dict[tuple[str, str], list[str]] = {}
    for checkpoint in inputs:
        for name, header in checkpoint.modules.items():
            reference, seen = first.setdefault(name, (checkpoint, header))
            if (seen.d_out, seen.d_in) != (header.d_out, header.d_in):
                what = f"module '{name}': '{reference.label}' has d_out={seen.d_out}, d_in={seen.d_in}, "
                what += f"'{checkpoint.label}' has d_out={header.d_out}, d_in={header.d_in}"
                conflicts.setdefault((reference.label, checkpoint.label), []).append(what)
    for found in conflicts.values():
        more = f" (and {len(found) - SHOWN} more modules)" if len(found) > SHOWN else ""
        yield IncompatibleInputsError(
            f"{'; '.join(found[:SHOWN])}{more}. All inputs must come from the same base model; compare "
            "'base_model_name_or_path' in each adapter_config.json."
        )


def _unmatched_rules(recipe: Recipe, resolver: SettingsResolver) -> Iterator[MergeError]:
    for index in resolver.unmatched:
        rule = recipe.rules[index]
        message = f"'{rule.match}' matches no module of the inputs, or only modules that earlier rules take"
        yield recipe.problem(("rules", index, "match"), message)


def _over_memory(modules: Sequence[ModulePlan], memory_bytes: int) -> Iterator[MergeError]:
    large = [module for module in modules if module.peak_bytes > memory_bytes]
    if large:
        worst = max(large, key=lambda module: module.peak_bytes)
        yield MemoryBudgetError(
            f"module '{worst.name}' needs {format_bytes(worst.peak_bytes)} in space '{worst.group.space.name}', and "
            f"the merge may hold {format_bytes(memory_bytes)} ({len(large)} modules are too large). "
            "Allow more with --memory, or choose a space without dense deltas (joint, core, factors)."
        )


def _compute_dtype(recipe: Recipe, inputs: Sequence[Checkpoint]) -> torch.dtype:
    """The recipe's; float64 where an input is, so that nothing is lost in silence."""
    asked: torch.dtype = getattr(torch, recipe.dtype)
    stored = {header.dtype for checkpoint in inputs for header in checkpoint.modules.values()}
    return torch.float64 if torch.float64 in stored else asked


def _out_dtype(recipe: Recipe, inputs: Sequence[Checkpoint]) -> torch.dtype:
    if recipe.out_dtype is not None:
        asked: torch.dtype = getattr(torch, recipe.out_dtype)
        return asked
    headers = (header for checkpoint in inputs for header in checkpoint.modules.values())
    dtype = next(headers).dtype
    for header in headers:
        dtype = torch.promote_types(dtype, header.dtype)
    return dtype


def _warnings(inputs: Sequence[Checkpoint], modules: Sequence[ModulePlan]) -> Iterator[str]:
    yield from _base_warnings(inputs)
    same: dict[object, list[Checkpoint]] = {}
    for checkpoint in inputs:
        same.setdefault(checkpoint.identity, []).append(checkpoint)
    for first, *others in same.values():
        if others:
            labels = ", ".join(f"'{other.label}'" for other in others)
            times = len(others) + 1
            yield f"'{first.label}' is given {times} times (also as {labels}); each counts with its own weight"
    for t, checkpoint in enumerate(inputs):
        lacking = [module.name for module in modules if t not in module.participants]
        if lacking:
            named = ", ".join(lacking[:SHOWN]) + (", …" if len(lacking) > SHOWN else "")
            yield f"'{checkpoint.label}' lacks {len(lacking)} of {len(modules)} modules ({named})"


def _split_surveys(modules: Sequence[ModulePlan]) -> Iterator[str]:
    groups = {module.group.key: module.group for module in modules}.values()
    surveyed = Counter(group.method for group in groups if group.strategy.survey() is not None)
    for method, count in surveyed.items():
        if count > 1:
            yield (
                f"'{method}' looks at all modules of one set of parameters together, and there are {count} sets: "
                "each has thresholds of its own"
            )


def _base_warnings(inputs: Sequence[Checkpoint]) -> Iterator[str]:
    bases = {c.base_model: c.label for c in reversed(inputs) if c.base_model}
    if len(bases) > 1:
        named = "; ".join(f"'{label}': {base}" for base, label in reversed(bases.items()))
        yield f"the inputs name different base models ({named}); merging is meaningful only if they are one model"
    if len({c.fan_in_fan_out for c in inputs}) > 1:
        yield "the inputs disagree on fan_in_fan_out; the output says true (peft corrects it for each layer it meets)"
