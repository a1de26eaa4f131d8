"""Jobs S1 to S6: this package beside a peer, whole models and single modules."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import limits, ours, peers
from tests.benchmarks.costs import Costs, full_svd_flops, thin_svd_flops
from tests.benchmarks.measuring import Contender, Figures, in_turn, isolated, say, spread
from tests.benchmarks.shapes import LLAMA_8B, LLAVA_7B, Model, Shape, one_module, write_set

RANK = 16
WARM_MERGES = 5
ELEMENTWISE_LAYERS = 1
"""Of a whole merge in ``delta``; the rest is extrapolated."""
QUICK_DIVISOR = 8


@dataclass(frozen=True)
class Bench:
    """What was asked for.

    Attributes:
        where: holds the adapters and the results.
        runs: of each contender.
        layers: of the models.
        inputs: of every merge; None for those of the model.
        peers: whether they run.
        quick: widths divided by 8, one run.
    """

    where: Path
    runs: int = 3
    layers: int = 32
    inputs: int | None = None
    peers: bool = True
    quick: bool = False

    def models(self) -> list[tuple[Model, int]]:
        """The models and how many adapters of each are merged."""
        cut = [
            (model.with_layers(self.layers), self.inputs or inputs) for model, inputs in ((LLAVA_7B, 8), (LLAMA_8B, 5))
        ]
        return [(model.narrowed(QUICK_DIVISOR), inputs) for model, inputs in cut] if self.quick else cut

    @property
    def work(self) -> Path:
        """For what is written on the way; empty at the start, gone at the end."""
        return self.where / "benchmark-work"

    @property
    def out(self) -> str:
        """Where a merge writes; free before and after."""
        return str(self.work / "out")

    def adapters(self, model: Model, inputs: int, rank: int = RANK) -> list[str]:
        """Adapters of a model, made where they are missing."""
        return write_set(self.where / "adapters", model, inputs=inputs, rank=rank)

    def startup(self) -> float:
        """Median seconds of the plan of a one-module recipe, cold."""
        recipe = ours.METHODS["linear"].recipe(self.adapters(one_module((64, 64)), 2), RANK)
        return spread([isolated(ours.planned, recipe)["wall_seconds"] for _ in range(max(3, self.runs))])["median"]


@dataclass
class Job:
    """What a job found: rows of whole merges, of single modules, curves of growth, remarks, targets."""

    title: str
    startup_seconds: float
    rows: list[Figures] = field(default_factory=list)
    modules: list[Figures] = field(default_factory=list)
    curves: list[Figures] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    targets: list[Figures] = field(default_factory=list)

    def row(self, model: str, name: str) -> Figures | None:
        """A row of a whole merge, where it is there."""
        return next((row for row in self.rows if (row["model"], row["name"]) == (model, name)), None)

    def target(self, text: str, found: float, unit: str, bound: float, *, at_least: bool = False) -> None:
        """A target and what was found."""
        met = found >= bound if at_least else found <= bound
        self.targets.append({"target": text, "found": f"{found:.3g} {unit}", "met": met})


def summary(name: str, runs: Sequence[Figures], *, who: str, startup: float = 0.0) -> Figures:
    """A row of a table: the spread of the seconds without the start-up, medians of the rest."""
    cpu = spread([run["cpu_seconds"] for run in runs])["median"]
    wall = spread([run["wall_seconds"] for run in runs])["median"]
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        "name": name,
        "who": who,
        "seconds": spread([run["wall_seconds"] - startup for run in runs]),
        "cpu_seconds": cpu,
        "utilisation": cpu / wall,
        "peak_bytes": spread(peaks)["median"] if peaks else None,
        "bytes_read": runs[0].get("bytes_read"),
        "bytes_written": runs[0].get("bytes_written"),
        "runs": list(runs),
    }


def whole_merges(
    bench: Bench, job: Job, model: Model, inputs: int, labels: Sequence[str], others: Sequence[Contender] = ()
) -> None:
    """Add the rows of whole merges: ours, others, and the limit of each of ours."""
    say(f" {model.name}, {model.layers} layers, {inputs} adapters")
    paths = bench.adapters(model, inputs)
    output_bytes = ours.size(Path(paths[0]))
    mine = [Contender(label, ours.merged, (ours.METHODS[label].recipe(paths, RANK), bench.out)) for label in labels]
    limit = Contender("limit", limits.measured_limit, (paths, bench.out, output_bytes))
    found = in_turn([*mine, *(others if bench.peers else ()), limit], bench.runs)
    rows = [summary(label, found[label], who="ours", startup=job.startup_seconds) for label in labels]
    rows += [summary(other.name, found[other.name], who="peer") for other in others if bench.peers]
    part = "" if model.layers == bench.layers else f" of {model.layers} layer(s)"
    rows.append(summary(f"reading, hashing, writing{part}", found["limit"], who="limit"))
    for row in rows:
        row["model"] = model.name
        if row["who"] == "ours":
            add_limit(row, found["limit"], limits.least_flops(row["name"], model, inputs, RANK))
    job.rows += rows


def add_limit(row: Figures, runs: Sequence[Figures], flops: float) -> None:
    """Add the physical limit of a row's work, and the share of the row's seconds that it is."""
    row["limit_seconds"] = spread([limits.limit_seconds(run, flops) for run in runs])["median"]
    row["limit_share"] = row["limit_seconds"] / row["seconds"]["median"]
    row["least_flops"] = flops


def compare(job: Job, model: Model, label: str, peer: str) -> None:
    """Note how many times ours a peer takes."""
    mine, other = job.row(model.name, label), job.row(model.name, peer)
    if mine and other:
        other["against"], other["ratio"] = label, other["seconds"]["median"] / mine["seconds"]["median"]


def extrapolated(job: Job, model: Model, name: str, seconds: float, cpu_seconds: float) -> None:
    """Add the row of a peer whose time for the model comes from its modules'."""
    row = {
        "name": name,
        "who": "peer",
        "model": model.name,
        "seconds": {"median": seconds, "min": seconds, "max": seconds, "runs": 0},
        "cpu_seconds": cpu_seconds,
        "utilisation": cpu_seconds / seconds,
        "extrapolated": True,
    }
    job.rows.append(row)


def single_modules(bench: Bench, job: Job, model: Model, inputs: int, labels: Sequence[str]) -> None:
    """Add the rows of our merges of one module of each shape."""
    for shape in model.counts:
        paths = bench.adapters(one_module(shape), inputs)
        for label in labels:
            recipe = ours.METHODS[label].recipe(paths, RANK)
            figures = isolated(ours.merged_warm, recipe, bench.out, WARM_MERGES)
            say(f"  {label}, {shape[0]} × {shape[1]}: {figures['wall_seconds']:.3g} s")
            job.modules.append({"model": model.name, "name": label, "shape": list(shape), "inputs": inputs, **figures})


def add_dense(
    job: Job, model: Model, label: str, peer: str, costs: Costs, dense: Callable[[Shape], Shape] = lambda s: s
) -> None:
    """Set a dense cost beside each of our modules, and its sum over the model beside the whole merge.

    Args:
        job: with our rows in it.
        model: theirs.
        label: theirs.
        peer: what the dense path is called.
        costs: of it.
        dense: the shape it decomposes, from that of the module.
    """
    for row in job.modules:
        shape = dense(tuple(row["shape"]))
        if (row["model"], row["name"]) == (model.name, label):
            row.setdefault("peers", {})[peer] = {
                "seconds": costs.of(shape),
                "cpu_seconds": costs.of(shape, "cpu_seconds"),
                "ratio": costs.of(shape) / row["wall_seconds"],
                "cpu_ratio": costs.of(shape, "cpu_seconds") / row["cpu_seconds"],
                "extrapolated": shape not in costs.measured,
            }
    shapes = Counter(dense(shape) for shape in model.counts.elements())
    name = f"{peer} ({label})"
    extrapolated(job, model, name, costs.total(shapes), costs.total(shapes, "cpu_seconds"))
    compare(job, model, label, name)


def module_target(job: Job, bound: float, peer: str, labels: Sequence[str]) -> None:
    """The least ratios to a dense path, over modules of 4096 × 4096 and up: in seconds and in processor seconds."""
    for label in labels:
        found = [
            row["peers"][peer]
            for row in job.modules
            if row["name"] == label and min(row["shape"]) >= 4096 and peer in row.get("peers", {})
        ]
        if found:
            text = f"{label}: at least {bound:g} × {peer} a module, 4096 × 4096 and up"
            job.target(text, min(ratios["ratio"] for ratios in found), "×", bound, at_least=True)
            least = min(ratios["cpu_ratio"] for ratios in found)
            job.target(f"{text}, in processor seconds", least, "×", bound, at_least=True)


def new_job(bench: Bench, title: str) -> Job:
    """A job with its start-up measured."""
    say(title)
    return Job(title, bench.startup())


def s1(bench: Bench) -> Job:
    """RobustMerge against its transcription."""
    job = new_job(bench, "S1 RobustMerge")
    model, inputs = bench.models()[0]
    loop = "authors' loop"
    other = Contender(loop, peers.run_robustmerge_loop, (bench.adapters(model, inputs), bench.out))
    whole_merges(bench, job, model, inputs, ["robustmerge"], [other])
    compare(job, model, "robustmerge", loop)
    mine, row = job.row(model.name, "robustmerge"), job.row(model.name, loop)
    job.target("within 3 × the physical limit", 1 / mine["limit_share"], "×", 3)
    if row:
        job.target("at least 2 × faster than the authors' loop", row["ratio"], "×", 2, at_least=True)
        if row["peak_bytes"]:
            job.target("in a quarter of its memory", mine["peak_bytes"] / row["peak_bytes"], "of it", 0.25)
    return job


def s2(bench: Bench) -> Job:
    """DRM in both directions against the dense joint SVD."""
    job = new_job(bench, "S2 DRM")
    labels = ["drm horizontal", "drm vertical"]
    costs = dense_joint_costs(bench, job) if bench.peers else None
    for model, inputs in bench.models():
        whole_merges(bench, job, model, inputs, labels)
        single_modules(bench, job, model, inputs, labels)
        for label in labels if costs else ():
            add_dense(job, model, label, "dense joint SVD", costs, concatenation(label, inputs))
    module_target(job, 500, "dense joint SVD", labels)
    return job


def concatenation(label: str, inputs: int) -> Callable[[Shape], Shape]:
    """The shape of all deltas of a module, side by side or on top of each other, and turned to be tall."""
    side = 0 if label == "drm vertical" else 1

    def dense(shape: Shape) -> Shape:
        wide = [*shape]
        wide[side] *= inputs
        return max(wide), min(wide)

    return dense


def dense_joint_costs(bench: Bench, job: Job) -> Costs:
    """The SVD of one module's concatenation, tall, and on a smaller shape the wide one too."""
    (model, inputs), (smaller, fewer) = bench.models()
    costs = Costs(thin_svd_flops)
    tall = concatenation("drm horizontal", inputs)(min(model.counts))
    narrow = concatenation("drm horizontal", fewer)(min(smaller.counts))
    for shape in (narrow, tall):
        costs.measured[shape] = once(f"dense joint SVD, {shape}", peers.run_dense_svd, *shape)
    wide = once("the same, wide", peers.run_dense_svd, *reversed(narrow))["wall_seconds"]
    seconds = costs.measured[narrow]["wall_seconds"]
    job.remarks.append(
        f"Dense joint SVDs are those of the tall orientation. The wide one takes torch {wide / seconds:.2g} times as "
        f"long ({narrow[1]} × {narrow[0]}: {wide:.3g} s, its transpose {seconds:.3g} s), which is not credited to ours."
    )
    return costs


def once(name: str, function: Callable[..., Figures], *arguments: Any) -> Figures:
    """The figures of one run."""
    figures: Figures = isolated(function, *arguments)
    say(f"  {name}: {figures['wall_seconds']:.3g} s")
    return figures


def s3(bench: Bench) -> Job:
    """The exact sum at the inputs' rank against peft's ``svd``."""
    job = new_job(bench, "S3 linear, cut to rank 16")
    variants = {"peft svd": True, "peft svd, full_matrices=False": False} if bench.peers else {}
    costs = {name: peft_costs(bench, "svd", full) for name, full in variants.items()}
    models = bench.models()
    first = models[0][0]
    for model, inputs in models:
        whole_merges(bench, job, model, inputs, ["linear"])
        single_modules(bench, job, model, inputs, ["linear"])
        for name, cost in costs.items() if model is first else ():
            add_dense(job, model, "linear", name, cost)
    for name in variants:
        module_target(job, 500, name, ["linear"])
    return job


def peft_costs(bench: Bench, kind: str, full_matrices: bool) -> Costs:
    """Of the first model's shapes that are not wide, with its number of inputs."""
    model, inputs = bench.models()[0]
    costs = Costs(full_svd_flops if full_matrices else thin_svd_flops)
    options = {"svd_full_matrices": full_matrices}
    for shape in model.counts:
        if shape[0] >= shape[1]:
            with scratch(bench) as directory:
                costs.measured[shape] = once(
                    f"peft {kind}, {shape}, {options}",
                    peers.run_peft_module,
                    *(kind, shape, inputs, RANK, options, directory),
                )
    return costs


@contextmanager
def scratch(bench: Bench) -> Iterator[str]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=bench.work) as directory:
        yield f"{directory}/adapters"


def s4(bench: Bench) -> Job:
    """TIES and DARE-TIES on the entries of the deltas against peft's."""
    job = new_job(bench, "S4 TIES and DARE-TIES in delta, cut to rank 16")
    kinds = {"ties": "ties_svd", "dare_ties": "dare_ties_svd"}
    costs = {label: peft_costs(bench, kind, full_matrices=False) for label, kind in kinds.items() if bench.peers}
    models = bench.models()
    first = models[0][0]
    for model, inputs in models:
        part = model.with_layers(min(ELEMENTWISE_LAYERS, model.layers))
        whole_merges(bench, job, part, inputs, list(kinds))
        for label in kinds:
            carry_over(job.row(model.name, label), model.layers / part.layers)
        single_modules(bench, job, model, inputs, list(kinds))
        for label, cost in costs.items() if model is first else ():
            add_dense(job, model, label, f"peft {kinds[label]}, full_matrices=False", cost)
    for label, kind in kinds.items():
        module_target(job, 30, f"peft {kind}, full_matrices=False", [label])
    if bench.peers:
        energy_target(bench, job)
    return job


def carry_over(row: Figures, factor: float) -> None:
    """Multiply what grows with the layers."""
    if factor != 1:
        row["extrapolated"] = True
        row["seconds"] = {k: v if k == "runs" else v * factor for k, v in row["seconds"].items()}
        for key in ("cpu_seconds", "bytes_read", "bytes_written", "limit_seconds", "least_flops"):
            row[key] *= factor


def energy_target(bench: Bench, job: Job) -> None:
    """TIES' captured energy beside that of the exact truncation, on one module."""
    model, inputs = bench.models()[0]
    shape = min(model.counts)
    recipe = ours.METHODS["ties"].recipe(bench.adapters(one_module(shape), inputs), RANK)
    found = isolated(peers.energies, recipe, bench.out)
    job.remarks.append(
        f"ties, {shape[0]} × {shape[1]}: rank {RANK} captures {found['captured_energy']:.6%} of the energy of the "
        f"merged delta, the exact truncation {found['exact_energy']:.6%}."
    )
    job.target("ties: captured energy within 0.1 % of the exact truncation's", found["shortfall"] * 100, "%", 0.1)


def s5(bench: Bench) -> Job:
    """Merges of A and B apart against peft's, the whole model loaded, merged, saved."""
    job = new_job(bench, "S5 linear and TIES in factors")
    pairs = {"linear in factors": ("linear", 4), "ties in factors": ("ties", 8)}
    for model, inputs in bench.models():
        paths = bench.adapters(model, inputs)
        others = [
            Contender(f"peft {kind}", peers.run_peft, (model, kind, paths, bench.out)) for kind, _ in pairs.values()
        ]
        whole_merges(bench, job, model, inputs, list(pairs), others)
        for label, (kind, bound) in pairs.items() if bench.peers else ():
            compare(job, model, label, f"peft {kind}")
            ratio = job.row(model.name, f"peft {kind}")["ratio"]
            text = f"{label}, {model.name}: at least {bound} × faster than peft"
            job.target(text, ratio, "×", bound, at_least=True)
    return job


def s6(bench: Bench) -> Job:
    """KnOTS-TIES, Core-Space TIES and TSV-M against one dense SVD a module."""
    job = new_job(bench, "S6 KnOTS-TIES, Core-Space TIES, TSV-M")
    labels = [label for label in ("knots", "core_ties", "tsv") if ours.installed(ours.METHODS[label])]
    if "tsv" not in labels:
        job.remarks.append("tsv was skipped: mergekit-lowrank-spectral (plugins/ of the repository) is not installed.")
        say(f" {job.remarks[-1]}")
    costs = Costs(thin_svd_flops)
    if bench.peers:
        shape = min(bench.models()[0][0].counts)
        costs.measured[shape] = once("dense SVD", peers.run_dense_svd, *shape)
        job.remarks.append(
            "The dense path is one SVD of one delta a module, in its tall orientation: less than any dense method does."
        )
    for model, inputs in bench.models():
        whole_merges(bench, job, model, inputs, labels)
        single_modules(bench, job, model, inputs, labels)
        for label in labels if bench.peers else ():
            add_dense(job, model, label, "one dense SVD", costs, lambda shape: (max(shape), min(shape)))
    return job
