"""What lies in the directory of a finished merge, read for a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import INDEX_NAME, REPORT_NAME
from mergekit_lowrank.recipe import Recipe, load_recipe
from mergekit_lowrank.report.manifest import Manifest
from mergekit_lowrank.report.results import Report

__all__ = ["MergeOutput", "counted", "named", "require_merge"]

SHOWN = 3
"""Names that a remark gives."""


@dataclass(frozen=True)
class MergeOutput:
    """The output of a merge.

    Attributes:
        name: what remarks call it.
        directory: where it lies.
        report: of the merge.
        recipe: that was merged.
        manifest: of its files.
    """

    name: str
    directory: Path
    report: Report
    recipe: Recipe
    manifest: Manifest

    @classmethod
    def read(cls, name: str, directory: Path) -> MergeOutput:
        """What lies in a directory.

        Raises:
            CheckpointError: it is no output of a merge, of another version of this package, or damaged.
            RecipeError: its ``recipe.yaml`` is not valid.
        """
        require_merge(directory)
        report, manifest = Report.read(directory), Manifest.read(directory)
        return cls(name, directory, report, load_recipe(directory / "recipe.yaml"), manifest)

    @cached_property
    def modules(self) -> dict[str, Mapping[str, Any]]:
        """The report's modules by name."""
        return {own["module"]: own for own in self.report.modules}

    @cached_property
    def base_models(self) -> tuple[str, ...]:
        """Those that its inputs name."""
        return tuple(sorted({summary.base_model for summary in self.report.inputs if summary.base_model}))

    @cached_property
    def hashes(self) -> dict[str, object]:
        """The SHA-256 of the files of each input, by label; without inputs that were not hashed or had no files."""
        found = {
            own.label: sorted((file.name, file.sha256 or "") for file in own.files) for own in self.manifest.sources
        }
        return {label: files for label, files in found.items() if files and all(digest for _, digest in files)}


def require_merge(directory: Path) -> None:
    """Raise a ``CheckpointError`` unless this is a directory, and not that of a sweep, whose variants it names."""
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "there is no such directory"
        raise CheckpointError(f"{directory}: {what}; expected what a merge has made.")
    if (directory / INDEX_NAME).is_file():
        variants = [entry.name for entry in sorted(directory.iterdir()) if (entry / REPORT_NAME).is_file()]
        raise CheckpointError(f"{directory}: holds a sweep. Name one of its variants: {', '.join(variants)}.")


def named(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def counted(modules: Sequence[str]) -> str:
    """``1 module is``, ``2 modules are``."""
    return "1 module is" if len(modules) == 1 else f"{len(modules)} modules are"
