"""Job S7: how the time and the memory of ours grow with modules, inputs, rank and width."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks import ours
from tests.benchmarks.jobs import RANK, Bench, Job, new_job
from tests.benchmarks.measuring import Contender, Figures, in_turn, isolated, say, spread
from tests.benchmarks.shapes import Model, one_module, square, write_set

POINT_RUNS = 3
POINT_PATIENCE_SECONDS = 1.0
"""A point that took longer is measured once."""
MEMORY_BOUND = 1.05


@dataclass(frozen=True)
class Point:
    """One merge of a curve.

    Attributes:
        value: where it lies on the axis.
        model: what is merged.
        inputs: how many adapters.
        rank: of each, and of the result.
    """

    value: int
    model: Model
    inputs: int = 4
    rank: int = RANK

    @property
    def dense_entries(self) -> int:
        """Of all deltas."""
        return self.inputs * sum(d_out * d_in for d_out, d_in in self.model.modules.values())


def axes(quick: bool) -> dict[str, list[Point]]:
    """The points of each curve, in ascending order."""
    if quick:
        return {
            "modules": [Point(7 * n, square(64, layers=n)) for n in (1, 4, 16)],
            "inputs": [Point(n, square(256, modules=2), inputs=n) for n in (2, 8)],
            "rank": [Point(r, square(256, modules=2), rank=r) for r in (4, 32)],
            "width": [Point(d, square(d, modules=1)) for d in (128, 512)],
        }
    return {
        "modules": [Point(7 * n, square(1024, layers=n), inputs=2) for n in (1, 4, 16, 64, 320)],
        "inputs": [Point(n, square(2048, modules=2), inputs=n) for n in (2, 4, 8, 16, 32, 64)],
        "rank": [Point(r, square(2048, modules=2), rank=r) for r in (4, 16, 64, 256)],
        "width": [Point(d, square(d, modules=1)) for d in (768, 1536, 3072, 6144, 16384)],
    }


METHODS = {
    "robustmerge": 1.1,
    "drm horizontal": 2.2,
    "linear": 2.2,
    "ties": 1.1,
    "dare_ties": 1.1,
    "linear in factors": 1.1,
    "ties in factors": 1.1,
    "knots": 2.2,
    "core_ties": 2.2,
    "tsv": 2.2,
}
"""The largest exponent in inputs that is aimed at."""
DENSE = ("ties", "dare_ties")
"""These go over every entry of every delta, and stop at so many of them."""
DENSE_LIMIT = 10**9 + 10**8


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log value, by least squares; times that are not positive are left out."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(values, seconds, strict=True) if y > 0]
    if len(logs) < 2:
        return math.nan
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)


def s7(bench: Bench) -> Job:
    """Curves of every method that is installed, along every axis."""
    job = new_job(bench, "S7 growth")
    labels = [label for label in METHODS if ours.installed(ours.METHODS[label])]
    startups = {label: startup(bench, label) for label in labels}
    for axis, points in axes(bench.quick).items():
        say(f" {axis}")
        curves = {label: [] for label in labels}
        for point in points:
            for label, found in measure(bench, point, labels).items():
                curves[label].append(found)
        shutil.rmtree(bench.work / "growth")
        job.curves += [curve(axis, label, found, startups[label]) for label, found in curves.items()]
    add_targets(job)
    return job


def startup(bench: Bench, label: str) -> float:
    """Median seconds of the plan of a one-module recipe."""
    recipe = ours.METHODS[label].recipe(bench.adapters(one_module((64, 64)), 2), RANK)
    return spread([isolated(ours.planned, recipe)["wall_seconds"] for _ in range(POINT_RUNS)])["median"]


def measure(bench: Bench, point: Point, labels: Sequence[str]) -> dict[str, Figures]:
    """Every method at one point; its adapters are deleted afterwards."""
    root = bench.work / "growth"
    labels = [label for label in labels if label not in DENSE or point.dense_entries <= DENSE_LIMIT]
    paths = write_set(root, point.model, inputs=point.inputs, rank=point.rank)
    recipes = {label: ours.METHODS[label].recipe(paths, point.rank) for label in labels}
    contenders = [
        Contender(f"{label}, {point.value}", ours.merged, (recipe, bench.out)) for label, recipe in recipes.items()
    ]
    runs = in_turn(contenders, POINT_RUNS, patience=POINT_PATIENCE_SECONDS)
    for path in paths:
        shutil.rmtree(path)
    return {label: {"value": point.value, "runs": found} for label, found in zip(labels, runs.values(), strict=True)}


def curve(axis: str, label: str, points: Sequence[Figures], startup_seconds: float) -> Figures:
    """A line of the table: seconds without start-up, peaks, the exponent over all points and that of the last step."""
    values = [point["value"] for point in points]
    walls = [[run["wall_seconds"] - startup_seconds for run in point["runs"]] for point in points]
    seconds = [spread(wall)["median"] for wall in walls]
    peaks = [[run["peak_bytes"] for run in point["runs"]] for point in points]
    return {
        "axis": axis,
        "name": label,
        "values": values,
        "seconds": seconds,
        "peak_bytes": [None if None in peak else spread(peak)["median"] for peak in peaks],
        "exponent": exponent(values, seconds),
        "last_step": exponent(values[-2:], seconds[-2:]),
        "startup_seconds": startup_seconds,
    }


def add_targets(job: Job) -> None:
    """Linear in modules, bounded in inputs, flat in memory."""
    for found in job.curves:
        last_step = f"(last step {found['last_step']:.2f})"
        if found["axis"] == "modules":
            job.target(f"{found['name']}: linear in modules", found["exponent"], last_step, 1.1)
            peaks = found["peak_bytes"]
            if None not in peaks:
                growth = peaks[-1] / peaks[-2]
                job.target(f"{found['name']}: memory flat in modules", growth, "× over the last step", MEMORY_BOUND)
        if found["axis"] == "inputs":
            bound = METHODS[found["name"]]
            job.target(f"{found['name']}: exponent in inputs ≤ {bound}", found["exponent"], last_step, bound)
