"""Passes over modules before the first one is merged: for methods, and budgets, that need to see all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from mergekit_lowrank.engine.merging import blamed, encode, read_updates
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.events import Event, SurveyRound
from mergekit_lowrank.executors import Executor, Job
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.strategies import Survey

__all__ = ["Rounds", "run_surveys"]

Measurement = TypeVar("Measurement")
Measure: TypeAlias = Callable[[ModulePlan, Sequence[LowRankUpdate]], Measurement]
"""Something small about a module, from its inputs as stored."""


class Rounds:
    """Reads modules before the merge, counts how often, and tells of it."""

    def __init__(self, plan: Plan, executor: Executor, tell: Callable[[Event], None]) -> None:
        self._plan, self._executor, self._tell = plan, executor, tell
        self._number = 0

    def run(
        self, modules: Sequence[ModulePlan], measure: Measure[Measurement]
    ) -> Iterator[tuple[ModulePlan, Measurement]]:
        """One round: each module with its measurement, in any order."""
        self._number += 1
        jobs = [self._job(module, measure) for module in modules]
        for module, measurement in self._executor.run(jobs, memory_bytes=self._plan.memory_bytes):
            self._tell(SurveyRound(module.name, self._number, len(modules)))
            yield module, measurement

    def _job(self, module: ModulePlan, measure: Measure[Measurement]) -> Job[tuple[ModulePlan, Measurement]]:
        return Job(
            module.name,
            module.peak_bytes,
            lambda: read_updates(self._plan, module),
            lambda updates: (module, measure(module, updates)),
        )


def run_surveys(plan: Plan, rounds: Rounds, device: torch.device) -> dict[str, Survey]:
    """The finished surveys by group; groups without one are absent.

    All groups go through their rounds together, so that a round reads each module once.
    """
    groups = {module.group.key: module.group for module in plan.modules}
    made = {key: group.strategy.survey() for key, group in groups.items()}
    surveys = {key: survey for key, survey in made.items() if survey is not None}

    def measure(module: ModulePlan, updates: Sequence[LowRankUpdate]) -> Any:
        with blamed(module):
            coordinates, context = encode(plan, module, updates, device, None)
            return surveys[module.group.key].measure(coordinates, context)

    unfinished = set(surveys)
    while unfinished:
        modules = [module for module in plan.modules if module.group.key in unfinished]
        totals: dict[str, Any] = {}
        for module, measurement in rounds.run(modules, measure):
            key = module.group.key
            totals[key] = totals[key] + measurement if key in totals else measurement
        unfinished = {key for key in _in_order(totals, surveys) if surveys[key].conclude(totals[key])}
    return surveys


def _in_order(totals: dict[str, Any], surveys: dict[str, Survey]) -> Iterable[str]:
    return (key for key in surveys if key in totals)
