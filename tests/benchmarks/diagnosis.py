"""What a diagnosis costs beside the merge that it is of: ``python -m tests.benchmarks.diagnosis WHERE``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mergekit_lowrank.diagnostics
import mergekit_lowrank.report
from mergekit_lowrank import Registry
from tests.benchmarks import ours
from tests.benchmarks.measuring import Contender, Figures, in_turn, measured, spread
from tests.benchmarks.shapes import LLAVA_7B, write_set

RANK = 16
INPUTS = 8


def diagnosed(recipe: dict[str, Any]) -> Figures:
    """One diagnosis."""
    Registry.load()  # imports of plugins come before the clock
    return measured(lambda: mergekit_lowrank.diagnostics.diagnose(recipe))


def compared(where: Path, *, layers: int, runs: int, labels: list[str]) -> dict[str, dict[str, Figures]]:
    """Seconds, processor seconds and peaks of merge and diagnosis, by method; runs in turn."""
    paths = write_set(where / "adapters", LLAVA_7B.with_layers(layers), inputs=INPUTS, rank=RANK)
    found = {}
    for label in labels:
        recipe = ours.METHODS[label].recipe(paths, RANK)
        with tempfile.TemporaryDirectory(dir=where) as scratch:
            merge = Contender("merge", ours.merged, (recipe, f"{scratch}/out"))
            both = in_turn([merge, Contender("diagnose", diagnosed, (recipe,))], runs)
        found[label] = {
            name: {key: spread([run[key] for run in own]) for key in ("wall_seconds", "cpu_seconds", "peak_bytes")}
            for name, own in both.items()
        }
    return found


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", type=Path, help="holds the adapters, which are kept")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["robustmerge", "linear"])
    arguments = parser.parse_args()
    found = compared(arguments.where, layers=arguments.layers, runs=arguments.runs, labels=arguments.methods)
    for label, both in found.items():
        for unit in ("wall_seconds", "cpu_seconds", "peak_bytes"):
            mine, other = both["diagnose"][unit]["median"], both["merge"][unit]["median"]
            print(f"{label:12} {unit:13} merge {other:.4g}  diagnose {mine:.4g}  ratio {mine / other:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
