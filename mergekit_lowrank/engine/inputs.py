"""Opening the inputs of a recipe: references to paths, paths to checkpoints, headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from mergekit_lowrank.errors import CheckpointError, MergeError, raise_together
from mergekit_lowrank.formats import Adapter, Checkpoint, ModelDirectory, WholeModel
from mergekit_lowrank.lowrank import InputUpdate
from mergekit_lowrank.recipe import InMemoryAdapter, ModelEntry, Recipe, resolve_directory, resolve_model
from mergekit_lowrank.registry import Registry

__all__ = ["open_base", "open_checkpoint", "open_inputs"]


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


def open_base(recipe: Recipe) -> ModelDirectory | None:
    """The base model, where the output is a model; else it is only a name.

    Raises:
        CheckpointError: it is no model directory, or one that is refused.
    """
    if recipe.output.kind == "adapter" or recipe.base_model is None:
        return None
    try:
        return ModelDirectory(resolve_directory(recipe.base_model, recipe.directory))
    except MergeError as error:
        raise type(error)(f"{recipe.where(('base_model',))}: {error}") from error


def open_inputs(
    recipe: Recipe, registry: Registry, *, base: ModelDirectory | None = None, problems: Sequence[MergeError] = ()
) -> list[Checkpoint]:
    """One checkpoint for each model of the recipe.

    Args:
        recipe: what to merge.
        registry: its formats open the checkpoints.
        base: what fine-tunes are compared with; modules of adapters are then called as they are there.
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
    return _against(base, checkpoints, recipe)


def _against(base: ModelDirectory | None, checkpoints: Sequence[Checkpoint], recipe: Recipe) -> list[Checkpoint]:
    """Whole models as what was changed in the base; adapters under the base's names where both are merged."""
    whole = [checkpoint.label for checkpoint in checkpoints if isinstance(checkpoint, WholeModel)]
    if base is None and not whole:
        return [*checkpoints]
    if recipe.output.kind == "adapter":
        message = f"'{whole[0]}' is a full fine-tune, whose norms and biases no adapter holds"
        raise recipe.problem(("output", "kind"), f"{message}; write output: {{kind: model}}")
    stored = {header.dtype for checkpoint in checkpoints for header in checkpoint.modules.values()}
    dtype = torch.float64 if torch.float64 in stored else getattr(torch, recipe.dtype)
    found: list[Checkpoint] = []
    problems: list[MergeError] = []
    for index, checkpoint in enumerate(checkpoints):
        try:
            if isinstance(checkpoint, WholeModel):
                found.append(checkpoint.against(base, dtype))
            else:
                found.append(_under_names_of(base, checkpoint))
        except MergeError as error:  # noqa: PERF203 - every input's problem is wanted
            problems += [_placed(problem, recipe, index) for problem in error.problems]
    raise_together(problems)
    return found


def _under_names_of(base: ModelDirectory | None, checkpoint: Checkpoint) -> Checkpoint:
    if base is None:
        return checkpoint
    names = {base.module_of(key): module for module, key in base.keys_for(checkpoint.modules).items()}
    return checkpoint if all(name == own for name, own in names.items()) else _Renamed(checkpoint, names)


class _Renamed(Checkpoint):
    """A checkpoint whose modules go by other names.

    Args:
        checkpoint: whatever it is.
        names: its own name of each module, by the new one.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.label, self.location, self.files = checkpoint.label, checkpoint.location, checkpoint.files
        self.base_model, self.revision = checkpoint.base_model, checkpoint.revision
        self.task_type, self.fan_in_fan_out = checkpoint.task_type, checkpoint.fan_in_fan_out
        self.config = checkpoint.config
        self._checkpoint, self._names = checkpoint, names
        self.modules = {name: replace(checkpoint.modules[own], name=name) for name, own in names.items()}

    @property
    def identity(self) -> object:
        """That of the checkpoint."""
        return self._checkpoint.identity

    def read(self, module: str) -> InputUpdate:
        """The update of one module."""
        return self._checkpoint.read(self._names[module])


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
    """Short unique names: the last part of each path, more of it where two agree, numbered where whole paths do.

    Random numbers are keyed by them, so they depend on the order of the models only where an adapter is given twice or
    is in memory.
    """
    spellings = [_spellings(entry.model) for entry in entries]
    depths = [0] * len(entries)
    while True:
        names = [own[depth] for own, depth in zip(spellings, depths, strict=True)]
        wholes = {
            name: {own[-1] for own, other in zip(spellings, names, strict=True) if other == name} for name in names
        }
        growing = [i for i, name in enumerate(names) if len(wholes[name]) > 1 and depths[i] + 1 < len(spellings[i])]
        if not growing:
            break
        for i in growing:
            depths[i] += 1
    counts, labels = Counter(names), list[str]()
    for name in names:
        numbered = (f"{name}#{number}" for number in count(1))
        taken = {*labels, *names}
        labels.append(next(label for label in numbered if label not in taken) if counts[name] > 1 else name)
    return labels


def _spellings(model: str | InMemoryAdapter) -> list[str]:
    """What an input may be called, shortest first."""
    if not isinstance(model, str):
        return ["adapter"]
    location, _, revision = model.rpartition("@") if "@" in model else (model, "", "")
    path = Path(location or model)
    parts = [part for part in path.parts if part != path.anchor]
    tails = ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    named = [f"{tails[0]}@{revision}", *(f"{tail}@{revision}" for tail in tails[1:])] if revision else tails[1:]
    return [tails[0], *named]
