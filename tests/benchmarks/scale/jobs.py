"""Jobs M1 to M5: what merges hold, how fast a fold is, whether blocks change a result."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measuring import Contender, Figures, in_turn, say, spread
from tests.benchmarks.scale import folds, peaks, references
from tests.benchmarks.scale.models import LLAMA_1B, LLAMA_3B, LLAMA_70B, LLAMA_500M, Llama, write_base, write_fine_tune
from tests.benchmarks.shapes import Model, write_set
from tests.benchmarks.tables import mebibytes, number, seconds, table

RANK = 16
BUDGETS = (256 << 20, 1 << 30, 4 << 30)
FOLD_BUDGET = 1 << 30
QUICK_DIVISOR = 16
QUICK_BUDGET = 64 << 20
"""In place of 256 MiB and 1 GiB: less than half of it is for modules."""


@dataclass(frozen=True)
class Bench:
    """What was asked for.

    Attributes:
        where: holds models, adapters and results.
        runs: of what is timed, and of merges whose peaks are compared.
        peers: whether peft runs.
        quick: widths divided by 16, few layers and inputs.
    """

    where: Path
    runs: int = 3
    peers: bool = True
    quick: bool = False

    @property
    def out(self) -> Path:
        """Where a merge writes; free before and after."""
        return self.where / "work" / "out"

    @property
    def budgets(self) -> Sequence[int]:
        """Of memory."""
        return (QUICK_BUDGET, BUDGETS[-1]) if self.quick else BUDGETS

    def cut(self, model: Llama) -> Llama:
        """The model, or a small one of its proportions."""
        return model.narrowed(QUICK_DIVISOR) if self.quick else model

    def adapters(self, model: Model, inputs: int) -> list[str]:
        """Adapters in bfloat16, made where they are missing."""
        return write_set(self.where / "adapters", model, inputs=inputs, rank=RANK, dtype=torch.bfloat16)

    def base(self, model: Llama, shards: int = 1) -> Path:
        """A base model in bfloat16, made where it is missing."""
        return write_base(self.where / model.name, model, shards=shards)

    def merged(self, recipe: dict[str, Any], **options: Any) -> Figures:
        """A merge in an interpreter of its own, and the hash of what it wrote, which is deleted."""
        figures = peaks.in_interpreter(recipe, self.out, **options)
        figures["sha256"] = weights_hash(self.out)
        shutil.rmtree(self.out)
        return figures


@dataclass
class Job:
    """What a job found.

    Attributes:
        title: of its section.
        head: of its table.
        rows: cells, as text.
        figures: all that was measured.
        remarks: below the table.
        targets: what was aimed at, what was found, whether it is enough.
    """

    title: str
    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    targets: list[Figures] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The section as Markdown."""
        remarks = "".join(f"* {remark}\n" for remark in self.remarks)
        return f"### {self.title}\n\n{table(self.head, self.rows, texts=2)}\n{remarks}"

    def target(self, text: str, found: str, met: bool) -> None:
        """A target and what was found."""
        self.targets.append({"target": text, "found": found, "met": met})

    def within(self, what: str, found: Figures, budget: int) -> None:
        """The target that a merge keeps to its budget."""
        peak = found["peak_bytes"]
        self.target(f"{what} within {mebibytes(budget)}", mebibytes(peak), peak <= budget)


def weights_hash(directory: Path) -> str:
    """SHA-256 over all tensor files."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def recipe_of(method: str, paths: Sequence[str | Path], **keys: Any) -> dict[str, Any]:
    """The merge of some inputs."""
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


def m1(bench: Bench) -> Job:
    """Many layers, and few of the same."""
    job = Job("M1 Adapters of a 70B model", ["", "budget", "few layers", "all layers", "ratio", "seconds"])
    model = bench.cut(LLAMA_70B).linear
    few, whole = (model.with_layers(layers) for layers in ((2, 6) if bench.quick else (4, model.layers)))
    for method in ("linear", "robustmerge", "drm"):
        for budget in bench.budgets:
            _compare_layers(bench, job, method, budget, few, whole)
    sizes = mebibytes(sum(path.stat().st_size for path in Path(bench.adapters(whole, 4)[0]).iterdir()))
    job.remarks.append(f"4 adapters of rank 16, bfloat16, {sizes} each; {few.layers} and {whole.layers} layers.")
    return job


def _compare_layers(bench: Bench, job: Job, method: str, budget: int, few: Model, whole: Model) -> None:
    def merged(model: Model, runs: int) -> list[Figures]:
        recipe = recipe_of(method, bench.adapters(model, 4), output={"rank": RANK})
        return [bench.merged(recipe, memory_bytes=budget) for _ in range(runs)]

    # Which modules meet in memory is chance: of few there are few chances, so they get several.
    small, large = merged(few, bench.runs), merged(whole, 1)[0]
    least = max(figures["peak_bytes"] for figures in small)
    ratio = large["peak_bytes"] / least
    peaks_shown = [mebibytes(least), mebibytes(large["peak_bytes"])]
    job.rows.append([method, mebibytes(budget), *peaks_shown, f"{ratio:.2f}", number(large["wall_seconds"])])
    job.figures += [{"method": method, "budget": budget, "few": small, "whole": large}]
    job.within(f"{method}, all layers,", large, budget)
    job.target(f"{method}, {mebibytes(budget)}: peak does not grow by 10 %", f"{ratio:.2f} ×", ratio <= 1.1)
    say(f"  {job.rows[-1]}")


def m2(bench: Bench) -> Job:
    """Results larger than the budget."""
    job = Job("M2 TIES on dense matrices larger than the budget", ["module", "budget", "peak", "with files", "seconds"])
    for shape in bench.cut(LLAMA_70B).linear.counts:
        model = Model(f"one-{shape[0]}x{shape[1]}", 1, {"mlp.up_proj": shape})
        recipe = recipe_of("ties", bench.adapters(model, 4), space="delta", output={"rank": RANK})
        found = [bench.merged(recipe, memory_bytes=budget) for budget in bench.budgets]
        name = f"{shape[0]} × {shape[1]}"
        for budget, figures in zip(bench.budgets, found, strict=True):
            job.rows.append([name, *_memory_cells(budget, figures)])
            job.within(f"{name},", figures, budget)
        equal = len({figures["sha256"] for figures in found}) == 1
        job.target(f"{name}: the same bytes under all budgets", "yes" if equal else "no", equal)
        job.figures.append({"shape": shape, "runs": found})
        say(f"  {job.rows[-len(found) :]}")
    job.remarks.append("*With files*: growth of the resident set, pages of files on disk among it.")
    return job


def _memory_cells(budget: int, figures: Figures) -> list[str]:
    sizes = (budget, figures["peak_bytes"], figures["resident_bytes"])
    return [*map(mebibytes, sizes), number(figures["wall_seconds"])]


def m3(bench: Bench) -> Job:
    """Many inputs, and several workers."""
    job = Job("M3 Many inputs and workers", ["", "inputs", "workers", "budget", "peak", "seconds"])
    model = bench.cut(LLAMA_1B).linear.with_layers(4)
    inputs, few = (8, 4) if bench.quick else (64, 8)
    cases = [(method, n, "threads", 2) for method in ("linear", "robustmerge", "drm") for n in (few, inputs)]
    cases += [("drm", few, "threads", 8), ("drm", few, "processes", 2)]
    for method, count, executor, workers in cases:
        budget = bench.budgets[-1] >> 3 if not bench.quick else bench.budgets[0] * 2
        recipe = recipe_of(method, bench.adapters(model, count), output={"rank": RANK})
        figures = bench.merged(recipe, memory_bytes=budget, executor=executor, workers=workers)
        cells = [method, str(count), f"{workers} {executor}", mebibytes(budget), mebibytes(figures["peak_bytes"])]
        job.rows.append([*cells, number(figures["wall_seconds"])])
        job.figures.append({"method": method, "inputs": count, "executor": executor, "workers": workers, **figures})
        job.within(f"{method}, {count} inputs, {workers} {executor},", figures, budget)
        say(f"  {job.rows[-1]}")
    return job


def m4(bench: Bench) -> Job:
    """An adapter folded into a base, beside a copy of the base and peft."""
    job = Job("M4 Folding", ["", "", "seconds", "MB/s", "of the copy", "memory"])
    _fold(bench, job, bench.cut(LLAMA_3B), shards=3, peft=False)
    _fold(bench, job, bench.cut(LLAMA_1B), shards=1, peft=True)
    job.remarks.append("All end with `sync`; the base is in the page cache.")
    return job


def _fold(bench: Bench, job: Job, model: Llama, *, shards: int, peft: bool) -> None:
    base, (adapter,) = bench.base(model, shards), bench.adapters(model.linear, 1)
    recipe = recipe_of("linear", [adapter], base_model=str(base), output={"kind": "model"})
    contenders = [
        Contender("copy", folds.copied, (str(base), str(bench.out))),
        Contender("fold", _folded, (bench, recipe)),
    ]
    if peft and bench.peers:
        contenders.append(Contender("peft", folds.merged_by_peft, (str(base), adapter, str(bench.out))))
    say(f" {model.name}")
    found = in_turn(contenders, bench.runs)
    size = sum(path.stat().st_size for path in base.iterdir())
    copy = spread([run["wall_seconds"] for run in found["copy"]])["median"]
    for name, runs in found.items():
        times = spread([run["wall_seconds"] for run in runs])
        peak = max(run["peak_bytes"] for run in runs)
        share = copy / times["median"]
        cells = [seconds(times), number(size / times["median"] / 1e6), f"{100 * share:.0f} %", mebibytes(peak)]
        job.rows.append([f"{model.name}, {size / 1e9:.2f} GB", f"**{name}**" if name == "fold" else name, *cells])
        if name == "fold":
            job.within(f"folding into {model.name}", {"peak_bytes": peak}, FOLD_BUDGET)
            job.target(f"folding into {model.name} at 70 % of the copy", f"{100 * share:.0f} %", share >= 0.7)
    job.figures.append({"model": model.name, "bytes": size, "runs": found})


def _folded(bench: Bench, recipe: dict[str, Any]) -> Figures:
    figures = peaks.in_interpreter(recipe, bench.out, flushes=True, memory_bytes=FOLD_BUDGET)
    shutil.rmtree(bench.out)
    return figures


def m5(bench: Bench) -> Job:
    """Full fine-tunes by blocks, beside the dense formulas in float64."""
    head = ["", "budget", "peak", "with files", "seconds", "tensors compared", "equal", "worst, in last places"]
    job = Job("M5 Full fine-tunes", head)
    model = bench.cut(LLAMA_500M)
    base = bench.base(model)
    tuned = [write_fine_tune(bench.where / f"{model.name}-tuned-{seed}", model, seed) for seed in (1, 2)]
    for method in references.METHODS:
        recipe = recipe_of(method, tuned, base_model=str(base), output={"kind": "model"})
        figures = peaks.in_interpreter(recipe, bench.out, memory_bytes=FOLD_BUDGET)
        figures |= references.compared(method, base, tuned, bench.out, _one_of_each(model))
        shutil.rmtree(bench.out)
        compared = [str(figures["tensors"]), f"{figures['equal_share']:.4%}", f"{figures['worst']:.2f}"]
        job.rows.append([method, *_memory_cells(FOLD_BUDGET, figures), *compared])
        job.figures.append({"method": method, **figures})
        job.within(f"{method} of 2 fine-tunes", figures, FOLD_BUDGET)
        say(f"  {job.rows[-1]}")
    return job


def _one_of_each(model: Llama) -> list[str]:
    """One linear layer of each shape."""
    return [*{shape: f"{name}.weight" for name, shape in model.linear.modules.items()}.values()]


JOBS = {"M1": m1, "M2": m2, "M3": m3, "M4": m4, "M5": m5}
