"""Opening the inputs of a recipe: references to paths, paths to checkpoints, headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
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
    if path.is_file() and any(cls().recognises(path.parent) for cls in registry.formats.values()):
        raise CheckpointError(f"'{path}' is a file of a checkpoint; give its directory, '{path.parent}'.")
    known = "; ".join(f"{cls.name} ({cls.summary})" for cls in registry.formats.values())
    raise CheckpointError(f"'{path}' is not a checkpoint of a known format. Known formats: {known}.")


def open_inputs(recipe: Recipe, registry: Registry, *, problems: Sequence[MergeError] = ()) -> list[Checkpoint]:
    """One checkpoint for each model of the recipe.

    Args:
        recipe: what to merge.
        registry: its formats open the checkpoints.
        problems: known beforehand. They are raised together with those of local inputs, and nothing is downloaded.

    Raises:
        MergeError: all problems.
    """
    download = _postpone if problems else None
    checkpoints: list[Checkpoint] = []
    found = list(problems)
    for index, (entry, label) in enumerate(zip(recipe.models, _labels(recipe.models), strict=True)):
        try:
            checkpoints.append(_open(entry, label, recipe, registry, download))
        except MergeError as error:  # noqa: PERF203 - every input's problem is wanted
            found += [_placed(problem, recipe, index) for problem in error.problems]
        except _PostponedError:
            continue
    raise_together(found)
    return checkpoints


class _PostponedError(Exception):
    """A download that would be of no use."""


def _postpone(*_: object, **__: object) -> str:
    raise _PostponedError


def _open(
    entry: ModelEntry, label: str, recipe: Recipe, registry: Registry, download: Callable[..., str] | None
) -> Checkpoint:
    if not isinstance(entry.model, str):
        return Adapter(entry.model.state_dict, entry.model.config).open(label=label)
    checkpoint = open_checkpoint(resolve_model(entry.model, recipe.directory, download=download), registry, label=label)
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
    counts, labels = Counter(names), list[str]()
    for name in names:
        numbered = (f"{name}#{number}" for number in count(1))
        taken = {*labels, *names}
        labels.append(next(label for label in numbered if label not in taken) if counts[name] > 1 else name)
    return labels
