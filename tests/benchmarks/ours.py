"""What is measured of this package: whole merges, merges of one module, plans."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mergekit_lowrank.report  # noqa: F401 - loaded before a clock starts
from mergekit_lowrank import Registry, merge, plan
from tests.benchmarks.measuring import Figures, PeakMemory, measured

DENSITY = 0.2
AS_PEFT = {"density": DENSITY, "weighted_election": False, "divisor": "count", "zero_sign": "positive"}
"""TIES as peft computes it, so that both do the same work (docs/how-to/migrate.md)."""


@dataclass(frozen=True)
class Method:
    """A method as it is benchmarked.

    Attributes:
        label: what tables call it.
        keys: of its recipe, beside the models and the output.
    """

    label: str
    keys: dict[str, Any] = field(hash=False)

    def recipe(self, paths: Sequence[str], rank: int) -> dict[str, Any]:
        """The merge of some adapters, cut to a rank."""
        return {**self.keys, "models": [{"model": path} for path in paths], "output": {"rank": rank}}


_METHODS = (
    Method("robustmerge", {"merge_method": "robustmerge"}),
    Method("drm horizontal", {"merge_method": "drm"}),
    Method("drm vertical", {"merge_method": "drm", "parameters": {"direction": "vertical"}}),
    Method("linear", {"merge_method": "linear", "parameters": {"normalize": False}}),
    Method("ties", {"merge_method": "ties", "space": "delta", "parameters": {**AS_PEFT, "inclusive": False}}),
    Method("dare_ties", {"merge_method": "dare_ties", "space": "delta", "parameters": AS_PEFT}),
    Method("linear in factors", {"merge_method": "linear", "space": "factors", "parameters": {"normalize": False}}),
    Method(
        "ties in factors",
        {"merge_method": "ties", "space": "factors", "parameters": {**AS_PEFT, "inclusive": False}},
    ),
    Method("knots", {"merge_method": "knots"}),
    Method("core_ties", {"merge_method": "core_ties"}),
    Method("tsv", {"merge_method": "tsv"}),
)
METHODS = {method.label: method for method in _METHODS}


def installed(method: Method) -> bool:
    """Whether the method, or the plugin that brings it, is here."""
    return method.keys["merge_method"] in Registry.load().methods


def merged(recipe: dict[str, Any], out: str) -> Figures:
    """One merge into a directory, hashes of the sources included; what it wrote is deleted again."""
    Registry.load()  # imports of plugins come before the clock
    figures = measured(lambda: merge(recipe, out))
    figures["bytes_read"] = sum(size(Path(entry["model"])) for entry in recipe["models"])
    figures["bytes_written"] = size(Path(out))
    shutil.rmtree(out)
    return figures


def planned(recipe: dict[str, Any]) -> Figures:
    """The plan of a recipe; of a one-module recipe, this is the start-up of a merge."""
    Registry.load()
    return measured(lambda: plan(recipe))


def merged_warm(recipe: dict[str, Any], out: str, times: int) -> Figures:
    """A module's own cost, as a peer's is taken: reading, saving and what a merge does once are apart.

    The median of ``times`` merges in one process after a first one. One thread works: processor seconds are the same.
    """
    merge(recipe, out, overwrite=True)
    with PeakMemory() as memory:
        reports = [merge(recipe, out, overwrite=True) for _ in range(times)]
    shutil.rmtree(out)
    wall = statistics.median(report.modules[0]["wall_seconds"] for report in reports)
    return {
        "wall_seconds": wall,
        "cpu_seconds": wall,
        "peak_bytes": memory.peak_bytes,
        "kept_energy": reports[0].totals.kept_energy,
    }


def size(directory: Path) -> int:
    """Bytes of the files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
