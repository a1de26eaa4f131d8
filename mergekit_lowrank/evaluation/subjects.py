"""What is judged: the base, the experts and the merges, each known by the content of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation.tasks import Task, Tasks
from mergekit_lowrank.formats import MANIFEST_NAME, REPORT_NAME, TIMINGS_NAME, Checkpoint
from mergekit_lowrank.recipe import Recipe, resolve_model
from mergekit_lowrank.report import sha256_of

__all__ = ["AGAINST", "BASE", "MERGED", "OWN", "Subject", "subjects_of"]

BASE, OWN, MERGED, AGAINST = "base", "own", "merged", "against"
JUDGED_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json")
"""Of weights, configurations and tokenizers."""
NOT_JUDGED = (MANIFEST_NAME, REPORT_NAME, TIMINGS_NAME)


@dataclass(frozen=True)
class Subject:
    """A model that is judged.

    Attributes:
        role: ``base``, ``own`` (the expert of a task), ``merged`` or ``against``.
        label: what the results call it.
        path: an adapter's or model's directory or file; None of the base alone.
        identity: SHA-256 over its files; nothing of the base.
        tasks: it is judged on.
    """

    role: str
    label: str
    path: Path | None
    identity: str
    tasks: tuple[str, ...]

    def key(self, name: str, task: Task, base: str) -> str:
        """SHA-256 of what is judged and how. The code of an evaluator is no part of it."""
        how = task.model_dump(mode="json", exclude={"expert"}, exclude_unset=True)
        return hashlib.sha256(json.dumps([self.identity, base, name, how]).encode()).hexdigest()


def subjects_of(
    tasks: Tasks,
    recipe: Recipe,
    opened: Sequence[Checkpoint],
    merged: Path,
    against: Path | None,
) -> list[Subject]:
    """The base, the experts that tasks name, the merge and the one to compare with.

    Args:
        tasks: what they are judged on.
        recipe: of the merge.
        opened: the recipe's models.
        merged: directory of the merge.
        against: directory of another one.

    Raises:
        EvaluationError: a directory is missing, or an expert was never a file.
    """
    every = tuple(tasks.tasks)
    found = [Subject(BASE, BASE, None, "", every)]
    for entry, checkpoint in zip(recipe.models, opened, strict=True):
        own = tuple(name for name, task in tasks.tasks.items() if task.expert == checkpoint.label)
        if own:
            if not isinstance(entry.model, str):
                raise EvaluationError(f"'{checkpoint.label}' is in memory, where no evaluator can read it; save it")
            path = resolve_model(entry.model, recipe.directory)
            found.append(Subject(OWN, checkpoint.label, path, identity_of(path), own))
    for role, directory in ((MERGED, merged), (AGAINST, against)):
        if directory is not None:
            found.append(Subject(role, role, directory.absolute(), identity_of(directory), every))
    return found


def identity_of(path: Path) -> str:
    """SHA-256 over the names and contents of what a model consists of.

    Raises:
        EvaluationError: there is nothing of a model.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_judged(file))
    if not files:
        raise EvaluationError(f"{path}: holds no weights; name the output directory of a merge")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _is_judged(file: Path) -> bool:
    return file.suffix in JUDGED_SUFFIXES and file.name not in NOT_JUDGED and file.is_file()
