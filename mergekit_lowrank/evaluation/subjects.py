"""What is judged: the base, the experts and the merges, each known by the content of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation.tasks import Task, Tasks
from mergekit_lowrank.formats import MANIFEST_NAME, TIMINGS_NAME, Checkpoint
from mergekit_lowrank.recipe import Recipe, resolve_model
from mergekit_lowrank.report import sha256_of

__all__ = ["AGAINST", "BASE", "MERGED", "OWN", "Subject", "subjects_of"]

BASE, OWN, MERGED, AGAINST = "base", "own", "merged", "against"
NOT_JUDGED = ("README.md", "recipe.yaml", MANIFEST_NAME, TIMINGS_NAME)
"""What is told of a model. So are ``report.*``, and whatever is hidden; anything else may be part of it."""


@dataclass(frozen=True)
class Subject:
    """A model that is judged.

    Attributes:
        role: ``base``, ``own`` (the expert of a task), ``merged`` or ``against``.
        label: what the results call it.
        path: an adapter's or model's directory or file; None of the base alone.
        identity: SHA-256 over its files; nothing of the base.
        base: its name, and the state of its files where it is a local one.
        tasks: it is judged on.
    """

    role: str
    label: str
    path: Path | None
    identity: str
    base: str
    tasks: tuple[str, ...]

    def key(self, name: str, task: Task) -> str:
        """SHA-256 of what is judged and how. The code of an evaluator is no part of it."""
        how = task.model_dump(mode="json", exclude={"expert"}, exclude_unset=True)
        return hashlib.sha256(json.dumps([self.identity, self.base, name, how]).encode()).hexdigest()


def subjects_of(
    tasks: Tasks,
    recipe: Recipe,
    opened: Sequence[Checkpoint],
    base: str,
    merged: Path,
    against: Path | None,
) -> list[Subject]:
    """The base, the experts that tasks name, the merge and the one to compare with.

    Args:
        tasks: what they are judged on.
        recipe: of the merge.
        opened: the recipe's models.
        base: what ``{base}`` stands for.
        merged: directory of the merge.
        against: directory of another one.

    Raises:
        EvaluationError: a directory is missing, or an expert was never a file.
    """
    every, base = tuple(tasks.tasks), base + state_of(Path(base))
    found = [Subject(BASE, BASE, None, "", base, every)]
    for entry, checkpoint in zip(recipe.models, opened, strict=True):
        own = tuple(name for name, task in tasks.tasks.items() if task.expert == checkpoint.label)
        if own:
            if not isinstance(entry.model, str):
                raise EvaluationError(f"'{checkpoint.label}' is in memory, where no evaluator can read it; save it")
            path = resolve_model(entry.model, recipe.directory)
            found.append(Subject(OWN, checkpoint.label, _plain(path), identity_of(path), base, own))
    for role, directory in ((MERGED, merged), (AGAINST, against)):
        if directory is not None:
            found.append(Subject(role, role, _plain(directory), identity_of(directory), base, every))
    return found


def _plain(path: Path) -> Path:
    """The absolute path without ``..``; a link keeps the name that its file is known by."""
    return path.parent.resolve() / path.name


def identity_of(path: Path) -> str:
    """SHA-256 over the names and contents of what a model consists of.

    Raises:
        EvaluationError: there is nothing of a model.
    """
    files = _files(path)
    if not files:
        raise EvaluationError(f"{path}: holds no weights; name the output directory of a merge")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def state_of(base: Path) -> str:
    """Sizes and times of a base's files, which are too many bytes to hash; empty where it is not a local one."""
    stats = [(str(file.relative_to(base)), file.stat()) for file in _files(base)]
    return "".join(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in stats)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if _is_judged(file.relative_to(path)) and file.is_file())


def _is_judged(file: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.parts)
    return not is_hidden and file.name not in NOT_JUDGED and file.stem != "report"
