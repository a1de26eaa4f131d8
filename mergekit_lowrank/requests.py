"""From what a caller names to what the engine runs: a recipe, an executor, and the plan of each variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lowrank.engine import (
    Plan,
    PlannedAdapter,
    SettingsResolver,
    build_plan,
    default_memory_bytes,
    dialect_of,
    open_inputs,
)
from mergekit_lowrank.errors import MergeError, RecipeError, raise_together
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.formats import PeftWriter, Writer
from mergekit_lowrank.recipe import HubId, Recipe, load_recipe, parse_recipe
from mergekit_lowrank.registry import Registry

__all__ = ["RecipeLike", "as_recipe", "executor_of", "plans_of", "refuse_below_one", "refuse_warnings", "writer_of"]

RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path


def as_recipe(recipe: RecipeLike) -> Recipe:
    """The recipe that a path, a mapping or a ``Recipe`` stands for.

    Raises:
        RecipeError: it is not valid.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(Path(recipe))


def executor_of(registry: Registry, recipe: Recipe, name: str | None, workers: int | None) -> Executor:
    """What schedules the modules: the one named, else the recipe's, else ``threads``.

    Raises:
        RecipeError: there is none of this name.
        MergeError: ``workers`` is below 1.
    """
    refuse_below_one(workers=workers)
    try:
        made = registry.executor(name or recipe.execution.executor or "threads")
    except RecipeError as error:
        raise error if name else recipe.problem(("execution", "executor"), str(error)) from error
    return made(workers or recipe.execution.workers)


def plans_of(
    whole: Recipe,
    registry: Registry,
    workers: int,
    memory_bytes: int | None,
    *,
    strict: bool,
    download: Callable[[HubId], Path] | None = None,
) -> dict[str, Plan]:
    """The plan of each variant.

    Args:
        whole: the recipe.
        registry: what there is to merge with.
        workers: modules that are merged at once.
        memory_bytes: what the merge may hold; None for what the recipe says.
        strict: whether a warning is an error.
        download: gives what lies on the Hugging Face Hub a path here; all of it when left out.
    """
    refuse_below_one(memory_bytes=memory_bytes)
    budget = memory_bytes or whole.execution.memory_bytes or default_memory_bytes()
    variants = whole.variants()
    resolvers = [SettingsResolver(variant, registry) for _, variant in variants]
    problems = {str(problem): problem for resolver in resolvers for problem in resolver.problems}
    inputs = open_inputs(whole, registry, problems=[*problems.values()], download=download)
    made = {
        name: build_plan(
            variant,
            inputs.checkpoints,
            resolver,
            memory_bytes=budget,
            workers=workers,
            variants=len(variants),
            base=inputs.base,
        )
        for (name, variant), resolver in zip(variants, resolvers, strict=True)
    }
    for own in made.values():
        writer = writer_of(own, registry)
        if writer is not None:
            writer.check(PlannedAdapter(own))
    if strict:
        refuse_warnings([warning for own in made.values() for warning in own.warnings])
    return made


def writer_of(made: Plan, registry: Registry) -> Writer | None:
    """What writes the adapter in another dialect than PEFT's; None where nothing does.

    Raises:
        RecipeError: there is no such dialect.
    """
    dialect = dialect_of(made.recipe)
    if made.folds or dialect == PeftWriter.name:
        return None
    try:
        return registry.writer(dialect)()
    except RecipeError as error:
        raise made.recipe.problem(("output", "format"), str(error)) from error


def refuse_warnings(warnings: Sequence[str]) -> None:
    """Raise them as errors, where there are any."""
    raise_together(
        [MergeError(f"{warning} (a warning, and warnings are errors under --strict)") for warning in warnings]
    )


def refuse_below_one(**numbers: int | None) -> None:
    """Raise a ``MergeError`` that names the number which is below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise MergeError(f"{name}={number}: expected a whole number of at least 1, or None for the recipe's")
