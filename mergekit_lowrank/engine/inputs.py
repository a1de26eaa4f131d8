"""Opening the inputs of a recipe: references to paths, paths to checkpoints, headers only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from mergekit_lowrank.engine.extras import needs_base, with_extras
from mergekit_lowrank.errors import CheckpointError, MergeError, raise_together
from mergekit_lowrank.formats import (
    ADD_BASE,
    Adapter,
    Checkpoint,
    Derived,
    FusedExperts,
    ModelDirectory,
    ModuleHeader,
    Whole,
    WholeModel,
)
from mergekit_lowrank.formats.layouts import LORA_BIAS
from mergekit_lowrank.lowrank import InputUpdate
from mergekit_lowrank.recipe import HubId, InMemoryAdapter, ModelEntry, Recipe, resolve_directory, resolve_model
from mergekit_lowrank.registry import Registry

__all__ = ["Inputs", "open_checkpoint", "open_inputs"]


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


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a recipe merges, opened.

    Attributes:
        checkpoints: one for each model of the recipe.
        base: the base model, where the output or an input needs it; else it is only a name.
    """

    checkpoints: list[Checkpoint]
    base: ModelDirectory | None


def open_inputs(
    recipe: Recipe,
    registry: Registry,
    *,
    problems: Sequence[MergeError] = (),
    download: Callable[[HubId], Path] | None = None,
) -> Inputs:
    """One checkpoint for each model of the recipe, and the base where it is needed.

    Args:
        recipe: what to merge.
        registry: its formats open the checkpoints.
        problems: known beforehand. They are raised together with those of local inputs, and nothing is downloaded.
        download: gives what lies on the Hugging Face Hub a path here; all of it when left out.

    Raises:
        MergeError: all problems.
    """
    get = _postpone if problems else download
    opened: list[Checkpoint] = []
    found = list(problems)
    for index, (entry, label) in enumerate(zip(recipe.models, _labels(recipe.models, recipe.directory), strict=True)):
        try:
            opened.append(_open(entry, label, recipe, registry, get))
        except MergeError as error:  # noqa: PERF203 - every input's problem is wanted
            found += [_placed(problem, recipe, index) for problem in error.problems]
        except _PostponedError:
            continue
    raise_together(found)
    base = _open_base(recipe, opened, download)
    stored = {header.dtype for own in opened for header in own.modules.values()}
    stored |= {extra.dtype for own in opened for extra in own.extras.values()}
    is_wide = torch.float64 in stored or not all(dtype.is_floating_point for dtype in stored)
    dtype = torch.float64 if is_wide else getattr(torch, recipe.dtype)
    ready = _against(base, opened, recipe, dtype)
    if base is not None and recipe.output.kind == "model":
        ready = [FusedExperts.of(own, base, dtype) for own in ready]
    ready = with_extras(ready, recipe, base, dtype)
    return Inputs(_under_one_name(ready, opened, recipe, base), base)


def _open_base(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], download: Callable[[HubId], Path] | None
) -> ModelDirectory | None:
    """The base model, where somebody needs it."""
    needed = any(checkpoint.needs_base for checkpoint in checkpoints) or needs_base(recipe, checkpoints)
    if recipe.base_model is None or not (needed or recipe.output.kind == "model"):
        return None
    try:
        return ModelDirectory(resolve_directory(recipe.base_model, recipe.directory, download=download))
    except MergeError as error:
        raise type(error)(f"{recipe.where(('base_model',))}: {error}") from error


def _against(
    base: ModelDirectory | None, checkpoints: Sequence[Checkpoint], recipe: Recipe, dtype: torch.dtype
) -> list[Checkpoint]:
    """The checkpoints that need their base with it."""
    found: list[Checkpoint] = []
    problems: list[MergeError] = []
    for index, own in enumerate(checkpoints):
        try:
            if own.needs_base is not None and base is None:
                raise CheckpointError(f"'{own.label}': {own.needs_base}, and no base is given. {ADD_BASE}.")
            found.append(own if base is None else own.against(base, dtype))
        except MergeError as error:  # noqa: PERF203 - every input's problem is wanted
            problems += [_placed(problem, recipe, index) for problem in error.problems]
    raise_together(problems)
    return found


def _under_one_name(
    ready: Sequence[Checkpoint], opened: Sequence[Checkpoint], recipe: Recipe, base: ModelDirectory | None
) -> list[Checkpoint]:
    """Adapters under the base's names, where they are added to it or merged with whole models."""
    if base is None or not (recipe.output.kind == "model" or any(isinstance(own, WholeModel) for own in opened)):
        return [*ready]
    found: list[Checkpoint] = []
    problems: list[MergeError] = []
    for index, own in enumerate(ready):
        try:
            found.append(own if isinstance(opened[index], WholeModel) else _under_names_of(base, own))
        except MergeError as error:  # noqa: PERF203 - every input's problem is wanted
            problems += [_placed(problem, recipe, index) for problem in error.problems]
    raise_together(problems)
    return found


def _under_names_of(base: ModelDirectory, checkpoint: Checkpoint) -> Checkpoint:
    without = [name for name, own in checkpoint.modules.items() if _is_lora_bias(own) and not base.has(name)]
    if without:
        raise CheckpointError(
            f"'{checkpoint.label}' has biases of lora_B ({len(without)}, such as for '{without[0]}'), and the layers "
            "of the base have none that could take them. Write an adapter instead of a model."
        )
    names: dict[str, str] = {}
    for module, key in base.keys_for(checkpoint.modules).items():
        other = names.setdefault(base.module_of(key), module)
        if other != module:
            raise CheckpointError(
                f"'{checkpoint.label}': modules '{other}' and '{module}' are one parameter of the base, '{key}', and "
                "are not added to it together. Leave one out, such as by extras: {from: base_model}."
            )
    return checkpoint if all(name == own for name, own in names.items()) else _Renamed(checkpoint, names)


def _is_lora_bias(header: ModuleHeader) -> bool:
    return isinstance(header.layout, Whole) and header.layout.key.endswith(LORA_BIAS)


class _Renamed(Derived):
    """A checkpoint whose modules go by other names.

    Args:
        checkpoint: whatever it is.
        names: its own name of each module, by the new one.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(checkpoint)
        self._names = names
        self.modules = {name: replace(checkpoint.modules[own], name=name) for name, own in names.items()}

    def read(self, module: str) -> InputUpdate:
        """The update of one module."""
        return self.origin.read(self._names[module])


class _PostponedError(Exception):
    """A download that would be of no use."""


def _postpone(hub_id: HubId) -> Path:
    del hub_id
    raise _PostponedError


def _open(
    entry: ModelEntry, label: str, recipe: Recipe, registry: Registry, download: Callable[[HubId], Path] | None
) -> Checkpoint:
    if not isinstance(entry.model, str):
        return Adapter(entry.model.state_dict, entry.model.config).open(label=label)
    checkpoint = open_checkpoint(resolve_model(entry.model, recipe.directory, download=download), registry, label=label)
    checkpoint.location = entry.model
    return checkpoint


def _placed(problem: MergeError, recipe: Recipe, index: int) -> MergeError:
    return type(problem)(f"{recipe.where(('models', index, 'model'))}: {problem}")


def _labels(entries: Sequence[ModelEntry], directory: Path) -> list[str]:
    """Short unique names: the last part of each path, more of it where two agree, numbered where whole paths do.

    Random numbers are keyed by them, so they depend on the order of the models only where an adapter is given twice or
    is in memory, and not on where paths start from: of local ones only what lies below their common directory counts.
    """
    below = _below_common([entry.model for entry in entries if isinstance(entry.model, str)], directory)
    spellings = [_spellings(below.get(m, m) if isinstance(m, str) else m) for m in (entry.model for entry in entries)]
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


def _below_common(models: Sequence[str], directory: Path) -> dict[str, str]:
    """The paths of those that lie on this disk, from the deepest directory that holds all of them."""
    places = {m: Path(os.path.normpath((directory / m).absolute())) for m in models if (directory / m).exists()}
    if not places:
        return {}
    common = Path(os.path.commonpath([place.parent for place in places.values()]))
    return {model: str(place.relative_to(common)) for model, place in places.items()}


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
