"""Opening the inputs of a recipe: references to paths, paths to checkpoints, headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mergekit_lowrank.errors import CheckpointError, MergeError, raise_together
from mergekit_lowrank.formats import Adapter, Checkpoint
from mergekit_lowrank.recipe import ModelEntry, Recipe, resolve_model
from mergekit_lowrank.registry import Registry

__all__ = ["open_checkpoint", "open_inputs"]


def open_checkpoint(path: Path, registry: Registry, *, label: str) -> Checkpoint:
    """The checkpoint at ``path``, opened by the first format that recognises it.

    Raises:
        CheckpointError: no format does, or the one that does finds it broken.
    """
    for format_class in registry.formats.values():
        reader = format_class()
        if reader.recognises(path):
            return reader.open(path, label=label)
    known = "; ".join(f"{cls.name} ({cls.summary})" for cls in registry.formats.values())
    raise CheckpointError(f"'{path}' is not a checkpoint of a known format. Known formats: {known}.")


def open_inputs(recipe: Recipe, registry: Registry) -> list[Checkpoint]:
    """One checkpoint for each model of the recipe; all problems are raised together."""
    checkpoints: list[Checkpoint] = []
    problems: list[MergeError] = []
    for index, (entry, label) in enumerate(zip(recipe.models, _labels(recipe.models), strict=True)):
        opened = _opened(entry, label, recipe, registry)
        if isinstance(opened, MergeError):
            problems += [_placed(problem, recipe, index) for problem in opened.problems]
        else:
            checkpoints.append(opened)
    raise_together(problems)
    return checkpoints


def _opened(entry: ModelEntry, label: str, recipe: Recipe, registry: Registry) -> Checkpoint | MergeError:
    try:
        return _open(entry, label, recipe, registry)
    except MergeError as error:
        return error


def _open(entry: ModelEntry, label: str, recipe: Recipe, registry: Registry) -> Checkpoint:
    if not isinstance(entry.model, str):
        return Adapter(entry.model.state_dict, entry.model.config).open(label=label)
    checkpoint = open_checkpoint(resolve_model(entry.model, recipe.directory), registry, label=label)
    checkpoint.location = entry.model
    return checkpoint


def _placed(problem: MergeError, recipe: Recipe, index: int) -> MergeError:
    return type(problem)(f"{recipe.where(('models', index, 'model'))}: {problem}")


def _labels(entries: Sequence[ModelEntry]) -> list[str]:
    """Short unique names for messages: the last part of each path, numbered where two agree."""
    names = [
        Path(entry.model.rpartition("@")[0] or entry.model).name if isinstance(entry.model, str) else "adapter"
        for entry in entries
    ]
    counts, seen, labels = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        labels.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
    return labels
