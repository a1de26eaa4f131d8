"""The comparison as a table of text, for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lowrank.evaluation.bootstrap import Estimate
from mergekit_lowrank.evaluation.results import Comparison, Evaluation

__all__ = ["table"]

Table = tuple[list[str], list[list[str]], list[str]]


def table(evaluation: Evaluation) -> Table:
    """Column names, rows of text, and which columns are aligned to the right.

    Scores are in percent where all of them are shares.
    """
    rows = evaluation.rows
    factor = 100.0 if all(0 <= score <= 1 for row in rows for score in _scores(row)) else 1.0
    columns = {
        "task": [row.name for row in rows],
        "expert": [row.expert or "" for row in rows],
        "base": [_score(row.base, factor) for row in rows],
        "own": [_score(row.own, factor) for row in rows],
        "merged": [_interval(row.merged, factor) for row in rows],
        "% of own": [_interval(row.normalised, 100) for row in rows],
        "merged - base": [_difference(row.gain, factor) for row in rows],
        "against": [_score(row.against, factor) for row in rows],
        "merged - against": [_difference(row.lead, factor) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return [*shown], [[*cells] for cells in zip(*shown.values(), strict=True)], [*shown][1:]


def _scores(row: Comparison) -> Iterator[float]:
    yield from (own.value for own in (row.base, row.own, row.merged, row.against) if own is not None)


def _score(estimate: Estimate | None, factor: float) -> str:
    return "" if estimate is None else f"{factor * estimate.value:.1f}"


def _interval(estimate: Estimate | None, factor: float, sign: str = "") -> str:
    if estimate is None:
        return ""
    value = f"{factor * estimate.value:{sign}.1f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{factor * estimate.low:{sign}.1f}, {factor * estimate.high:{sign}.1f}]"


def _difference(estimate: Estimate | None, factor: float) -> str:
    """The difference, and in words whether it is more than noise."""
    if estimate is None:
        return ""
    known = "" if estimate.low is None else " better" if estimate.is_beyond_noise else " within noise"
    if estimate.is_beyond_noise and estimate.value < 0:
        known = " worse"
    return _interval(estimate, factor, "+") + known
