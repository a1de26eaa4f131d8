"""Base, expert and merge beside each other: ratios and differences of their scores, replicate by replicate."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lowrank.evaluation.bootstrap import Sample, combined, divided, mean_of, samples_of
from mergekit_lowrank.evaluation.outcomes import Outcome
from mergekit_lowrank.evaluation.results import Basis, Comparison

__all__ = ["Row", "mean_row", "row_of"]

WEAKEST_LAST: tuple[Basis, ...] = ("examples", "count", "stderr", "none")


@dataclass(frozen=True, eq=False)
class Row:
    """One task, or the mean over several.

    Attributes:
        name: of the task, or what the mean is over.
        tasks: how many it is of.
        expert: the label of the task's expert.
        examples: that each model was judged on, where that is known.
        basis: what the intervals come from.
        samples: ``base``, ``own``, ``merged``, ``against``, ``normalised``, ``gain``, ``lead``: those that there are.
    """

    name: str
    tasks: int
    expert: str | None
    examples: int | None
    basis: Basis
    samples: Mapping[str, Sample]

    def comparison(self) -> Comparison:
        """The row in figures."""
        facts = {key: getattr(self, key) for key in ("name", "tasks", "expert", "examples", "basis")}
        roles = ("base", "own", "merged", "against", "normalised", "gain", "lead")
        found = {role: self.samples[role].estimate() if role in self.samples else None for role in roles}
        return Comparison.model_validate(facts | found)


def row_of(name: str, expert: str | None, outcomes: Mapping[str, Outcome], *, resamples: int, seed: int) -> Row:
    """One task.

    Args:
        name: of the task.
        expert: the label of its expert.
        outcomes: of ``merged``, and of ``base``, ``own`` and ``against`` where there are any.
        resamples: replicates.
        seed: of the draws.

    Raises:
        EvaluationError: models were judged on different numbers of examples.
    """
    samples = samples_of(name, outcomes, resamples=resamples, seed=seed)
    merged = outcomes["merged"]
    examples = len(merged.examples) or merged.count
    return Row(name, 1, expert, examples, _weakest(map(_basis, outcomes.values())), samples | dict(_derived(samples)))


def _derived(samples: Mapping[str, Sample]) -> Iterator[tuple[str, Sample]]:
    """The ratio and the differences that are defined."""
    merged = samples["merged"]
    if "own" in samples and samples["own"].value > 0:
        yield "normalised", combined(divided, merged, samples["own"])
    for name, role in (("gain", "base"), ("lead", "against")):
        if role in samples:
            yield name, combined(operator.sub, merged, samples[role])


def mean_row(name: str, rows: Sequence[Row]) -> Row:
    """The mean over tasks, each of which weighs alike, of all that every one of them has."""
    shared = [role for role in rows[0].samples if all(role in row.samples for row in rows)]
    samples = {role: mean_of([row.samples[role] for row in rows]) for role in shared}
    return Row(name, len(rows), None, None, _weakest(row.basis for row in rows), samples)


def _basis(outcome: Outcome) -> Basis:
    if outcome.examples:
        return "examples"
    return "stderr" if outcome.stderr else "none" if outcome.count is None else "count"


def _weakest(bases: Iterable[Basis]) -> Basis:
    return max(bases, key=WEAKEST_LAST.index)
