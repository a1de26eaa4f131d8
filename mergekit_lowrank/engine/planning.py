"""Making a plan: every module resolved, and every problem found, before any tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_lowrank.engine.companions import planned_tokenizer
from mergekit_lowrank.engine.memory import footprint, format_bytes, overhead_bytes
from mergekit_lowrank.engine.plan import Fold, ModulePlan, Plan
from mergekit_lowrank.engine.provenance import licence_warnings, source_cards
from mergekit_lowrank.engine.ranks import over_accepted, rank_policy, under_budget, uniform_rank
from mergekit_lowrank.engine.settings import Group, Settings, SettingsResolver, filter_warnings
from mergekit_lowrank.engine.targets import model_config_remarks, target_problems, target_remarks
from mergekit_lowrank.errors import (
    IncompatibleInputsError,
    MemoryBudgetError,
    MergeError,
    RecipeError,
    StrategyError,
    raise_together,
)
from mergekit_lowrank.formats import (
    Checkpoint,
    Embedding,
    Factored,
    Layout,
    ModelDirectory,
    ModelLayout,
    ModuleHeader,
    Whole,
    unloadable,
)
from mergekit_lowrank.formats.parameters import is_output
from mergekit_lowrank.policies import RankPolicy, WholeRank
from mergekit_lowrank.recipe import Depths, From, Recipe
from mergekit_lowrank.spaces import ModuleShape

__all__ = ["build_plan"]

SHOWN = 3
"""Examples named in one message; the rest is counted."""


def build_plan(
    recipe: Recipe,
    inputs: Sequence[Checkpoint],
    resolver: SettingsResolver,
    *,
    memory_bytes: int,
    workers: int = 1,
    variants: int = 1,
    base: ModelDirectory | None = None,
) -> Plan:
    """The plan of a merge.

    Args:
        recipe: what to merge.
        inputs: opened, one for each model of the recipe.
        resolver: of this recipe, without problems.
        memory_bytes: what the merge may hold.
        workers: modules that are merged at once where memory allows.
        variants: merges of these inputs that are made together.
        base: the base model, opened, where the output or an input needs it.

    Raises:
        MergeError: every problem of the inputs and the budget, together.
    """
    problems: list[MergeError] = [*_incompatibilities(inputs)]
    raise_together(problems)
    compute, stored = _compute_dtype(recipe, inputs), _out_dtype(recipe, inputs, base)
    names = _module_names(inputs)
    headers = sum(len(checkpoint.modules) for checkpoint in inputs) + (len(base.source.specs) if base else 0)
    overhead = overhead_bytes(workers, len(names) * variants, headers)
    draft = _Draft(recipe, inputs, resolver, compute, stored, memory_bytes - overhead)
    modules = draft.modules()
    problems += draft.problems
    problems += _unmatched_rules(recipe, resolver)
    problems += _over_memory(modules, memory_bytes, overhead)
    problems += over_accepted(recipe, {module.name: module.rank for module in modules})
    factored = [module for module in modules if module.is_factored]
    if not (problems or factored) and recipe.output.kind == "adapter":
        problems.append(_without_factors(inputs))
    problems += under_budget(recipe, [(module.rank, module.bytes_per_rank(stored)) for module in factored])
    tokenizer: dict[str, Path] = {}
    try:
        tokenizer = planned_tokenizer(recipe, inputs, base)
    except MergeError as error:
        problems += error.problems
    fold, tied = None, list[str]()
    try:
        if base is not None and recipe.output.kind == "model":
            fold = _fold(recipe, inputs, base)
            tied = [*_tied(inputs, base, fold)]
    except MergeError as error:
        problems += error.problems
    raise_together(problems)
    made = Plan(
        recipe=recipe,
        inputs=tuple(inputs),
        modules=modules,
        out_dtype=stored,
        compute_dtype=compute,
        uniform_rank=uniform_rank(recipe, [module.rank for module in factored]),
        memory_bytes=memory_bytes,
        overhead_bytes=overhead,
        warnings=(
            *_warnings(inputs, modules),
            *_split_surveys(modules),
            *filter_warnings(recipe, names),
            *licence_warnings(source_cards(recipe, inputs, base)),
            *model_config_remarks(inputs),
            *tied,
        ),
        fold=fold,
        base=base,
        tokenizer=tokenizer,
    )
    raise_together([*_unloadable(made), *target_problems(made)])
    return replace(made, warnings=(*made.warnings, *target_remarks(made)))


def _without_factors(inputs: Sequence[Checkpoint]) -> IncompatibleInputsError:
    labels = ", ".join(f"'{own.label}'" for own in inputs)
    return IncompatibleInputsError(
        f"no module of {labels} has low-rank factors, and an adapter without any does not load; give an input that has "
        "some, or fold what there is into the base with output: {kind: model}"
    )


_FACTORS_KEPT = (
    "'{}' needs its factors written as they are: set output.rank: max (or as much as the largest input rank) "
    "and output.balance: false"
)


class _Draft:
    """The modules of a plan in the making."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Sequence[Checkpoint],
        resolver: SettingsResolver,
        compute: torch.dtype,
        stored: torch.dtype,
        modules_bytes: int,
    ) -> None:
        self._recipe, self._inputs, self._resolver = recipe, inputs, resolver
        self._compute, self._stored = compute, stored
        self._modules_bytes = modules_bytes
        self._depths = Depths(_module_names(inputs))
        ranks = [header.rank for c in inputs for header in c.modules.values() if not header.is_dense]
        self._largest_rank = max(ranks, default=1)
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
        headers = [self._inputs[t].modules[name] for t in participants]
        try:
            layout, replaces = self._layout(participants, headers), headers[0].replaces
            is_factored = isinstance(layout, Factored)
            settings = self._resolver.of(
                name,
                self._depths.of(name),
                is_matrix=all(header.kind == "matrix" for header in headers),
                replaces=replaces,
            )
            weights, total = self._participant_weights(name, settings, participants)
            if replaces:
                weights, total = _shares(settings, participants, self._recipe)
            settings.group.strategy.check_weights(weights, total)
            shape = ModuleShape(
                headers[0].d_out,
                headers[0].d_in,
                tuple(header.rank for header in headers),
                sum(header.is_dense for header in headers),
            )
            rank = rank_policy(settings, shape, self._recipe, self._largest_rank, is_factored=is_factored)
            self._check_method(settings.group, shape, rank)
        except MergeError as error:
            self._failures.setdefault((type(error), str(error)), []).append(name)
            return None
        stored = sum(header.stored_bytes for header in headers)
        group = settings.group
        whole = footprint(
            shape,
            group.strategy,
            group.space,
            stored_bytes=sum(header.stored_bytes for header in headers if not header.is_dense),
            rank=None if isinstance(rank, WholeRank) else rank.planned or group.space.merged_rank(shape),
            compute_bytes=self._compute.itemsize,
            canonical=self._recipe.canonical is not None,
            balanced=self._recipe.output.balance,
        )
        held = whole.within(self._modules_bytes)
        return ModulePlan(
            name,
            shape,
            participants,
            weights,
            total,
            group,
            settings.scale,
            rank,
            held.peak_bytes,
            held.scratch_bytes,
            stored,
            layout,
            self._stored_dtype(headers, layout),
        )

    def _layout(self, participants: Sequence[int], headers: Sequence[ModuleHeader]) -> Layout:
        """The one that all inputs have; where the output is a model, whatever the first has."""
        other = next((n for n, header in enumerate(headers) if header.layout != headers[0].layout), None)
        if other is not None and self._recipe.output.kind == "adapter":
            first, second = (self._inputs[participants[n]].label for n in (0, other))
            raise IncompatibleInputsError(
                f"'{first}' holds {headers[0].layout}, '{second}' {headers[other].layout}; inputs must change the same "
                "parameters of one base model, in the same way"
            )
        return headers[0].layout

    def _stored_dtype(self, headers: Sequence[ModuleHeader], layout: Layout) -> torch.dtype:
        """That of all factors; of a tensor without any its own, unless the recipe says otherwise for numbers."""
        are_numbers = all(header.dtype.is_floating_point for header in headers)
        if isinstance(layout, Factored) or (self._recipe.out_dtype is not None and are_numbers):
            return self._stored
        dtype = headers[0].dtype
        for header in headers[1:]:
            dtype = torch.promote_types(dtype, header.dtype)
        return dtype

    def _check_method(self, group: Group, shape: ModuleShape, rank: RankPolicy) -> None:
        if group.strategy.keeps_factors and not self._keeps_factors(group, shape, rank):
            raise StrategyError(_FACTORS_KEPT.format(group.method))
        if shape.dense and not group.takes_dense:
            raise StrategyError(
                f"'{group.method}' in space '{group.space.name}' merges the factors of adapters, and {shape.dense} of "
                "the inputs are full fine-tunes; use a method that takes these (`mergekit-lowrank strategies` lists "
                "them), such as linear, ties or drm"
            )

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


def _shares(settings: Settings, participants: Sequence[int], recipe: Recipe) -> tuple[tuple[float, ...], float]:
    """Weights of tensors that replace the base's: shares of a whole among the inputs that have them."""
    if isinstance(recipe.extras, From):  # that model's, whatever its weight (and it may be given twice)
        return (1.0 / len(participants),) * len(participants), 1.0
    own = [settings.weights[t] for t in participants]
    if min(own) < 0 or not sum(own):
        raise RecipeError(
            f"its values replace those of the base and are averaged, which the weights {own} do not allow: they must "
            "not be negative, nor all 0. Use extras: delta, or {from: MODEL}"
        )
    return tuple(weight / sum(own) for weight in own), 1.0


def _module_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """All modules, in the order of the first input's file, then of the next one's."""
    return list(dict.fromkeys(name for checkpoint in inputs for name in checkpoint.modules))


def _incompatibilities(inputs: Sequence[Checkpoint]) -> Iterator[MergeError]:
    decisive = [_decisive(checkpoint) for checkpoint in inputs]
    owners = Counter(name for names in decisive for name in names)
    for checkpoint, names in zip(inputs, decisive, strict=True):
        if len(inputs) > 1 and not any(owners[name] > 1 for name in names):
            other = next(c for c in inputs if c is not checkpoint)
            yield IncompatibleInputsError(
                f"'{checkpoint.label}' shares no module with the other inputs: "
                f"it has '{names[0]}', '{other.label}' has '{_decisive(other)[0]}'. "
                "Inputs must be adapters of one base model, with the same key prefix; "
                "compare them with `mergekit-lowrank inspect`."
            )
    yield from _shape_conflicts(inputs)


def _decisive(checkpoint: Checkpoint) -> list[str]:
    """The modules by which inputs meet: those with factors, since a head is called the same whatever lies below it."""
    factored = [name for name, own in checkpoint.modules.items() if isinstance(own.layout, Factored)]
    return factored or [*checkpoint.modules]


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


def _over_memory(modules: Sequence[ModulePlan], memory_bytes: int, overhead: int) -> Iterator[MergeError]:
    large = [module for module in modules if module.peak_bytes > memory_bytes - overhead]
    if large:
        worst = max(large, key=lambda module: module.peak_bytes)
        least = format_bytes(worst.peak_bytes + overhead)
        instead = "the space delta" if worst.shape.dense else "a space without dense deltas (joint, core, factors)"
        disk = f", with {format_bytes(worst.scratch_bytes)} more on disk" if worst.scratch_bytes else ""
        yield MemoryBudgetError(
            f"module '{worst.name}' needs {format_bytes(worst.peak_bytes)} in space '{worst.group.space.name}'{disk}, "
            f"and the merge may hold {format_bytes(memory_bytes)}, of which {format_bytes(overhead)} are for itself "
            f"({len(large)} modules are too large). Allow {least} with --memory, take fewer workers (--workers), or "
            f"choose {instead}."
        )


def _fold(recipe: Recipe, inputs: Sequence[Checkpoint], base: ModelDirectory) -> Fold:
    """Where each module lies in the base.

    Raises:
        MergeError: every module that does not fit.
    """
    headers = {name: header for c in inputs for name, header in c.modules.items()}
    keys = base.keys_for(list(headers))
    out_dtype = None if recipe.out_dtype is None else getattr(torch, recipe.out_dtype)
    layout = ModelLayout.of(base.source, base.shards, out_dtype=out_dtype, shard_bytes=recipe.output.shard_bytes)
    problems = []
    for name, header in headers.items():
        own = base.modules[base.module_of(keys[name])]
        if (own.d_out, own.d_in) != (header.d_out, header.d_in):
            sizes = f"the inputs have {header.d_out} x {header.d_in}, the base {own.d_out} x {own.d_in}"
            problems.append(f"module '{name}': {sizes}")
    if problems:
        more = f" (and {len(problems) - SHOWN} more modules)" if len(problems) > SHOWN else ""
        raise IncompatibleInputsError(
            f"{'; '.join(problems[:SHOWN])}{more}. base_model must be the model that the inputs were tuned from."
        )
    return Fold(base, keys, layout)


def _compute_dtype(recipe: Recipe, inputs: Sequence[Checkpoint]) -> torch.dtype:
    """The recipe's; float64 where an input is, or has whole numbers, so that nothing is lost in silence."""
    asked: torch.dtype = getattr(torch, recipe.dtype)
    stored = {header.dtype for checkpoint in inputs for header in checkpoint.modules.values()}
    is_wide = torch.float64 in stored or not all(dtype.is_floating_point for dtype in stored)
    return torch.float64 if is_wide else asked


def _out_dtype(recipe: Recipe, inputs: Sequence[Checkpoint], base: ModelDirectory | None) -> torch.dtype:
    """The recipe's; else of an adapter the widest of the inputs, of a model what most of its base is stored in."""
    if recipe.out_dtype is not None:
        asked: torch.dtype = getattr(torch, recipe.out_dtype)
        return asked
    if base is not None and recipe.output.kind == "model":
        stored: Counter[torch.dtype] = Counter()
        for spec in base.source.specs.values():
            stored[spec.dtype] += spec.stored_bytes
        return stored.most_common(1)[0][0]
    headers = [header for checkpoint in inputs for header in checkpoint.modules.values()]
    factored = [header for header in headers if isinstance(header.layout, Factored)] or headers
    dtype = factored[0].dtype
    for header in factored[1:]:
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
    are_dense = [
        any(header.is_dense and isinstance(header.layout, Factored) for header in c.modules.values()) for c in inputs
    ]
    for t, checkpoint in enumerate(inputs):
        if any(are_dense) and not are_dense[t]:
            continue  # adapters change some matrices, fine-tunes everything
        lacking = [module.name for module in modules if t not in module.participants]
        if lacking:
            named = ", ".join(lacking[:SHOWN]) + (", …" if len(lacking) > SHOWN else "")
            yield f"'{checkpoint.label}' lacks {len(lacking)} of {len(modules)} modules ({named})"


def _unloadable(made: Plan) -> Iterator[MergeError]:
    """What the inputs hold together that no adapter can."""
    if not made.folds:
        for what in unloadable({module.name: module.layout for module in made.modules}):
            yield IncompatibleInputsError(
                f"the merged adapter would hold {what}, and peft does not load them together. Leave one out, such as "
                "by extras: {from: base_model}, or write output: {kind: model}"
            )


def _tied(inputs: Sequence[Checkpoint], base: ModelDirectory, fold: Fold) -> Iterator[str]:
    """Embeddings that adapters change alone, and that are the output layer of the base too."""
    for name, key in fold.keys.items():
        if base.outputs_tied_to(base.module_of(key)) and any(_is_alone(own, name) for own in inputs):
            yield (
                f"'{name}' is the output layer of the base too, so both change; peft changes the embedding alone, "
                "unless the adapter was trained with ensure_weight_tying"
            )


def _is_alone(checkpoint: Checkpoint, name: str) -> bool:
    """Whether an adapter changes an embedding, and not the output layer with it."""
    header = checkpoint.modules.get(name)
    if header is None or any(is_output(extra.name) for extra in checkpoint.extras.values()):
        return False
    rows = [extra for extra in checkpoint.extras.values() if extra.tokens and extra.name == f"{name}.weight"]
    return isinstance(header.layout, Embedding) or (isinstance(header.layout, Whole) and not rows)


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
