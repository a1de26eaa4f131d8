"""The pass over all modules that some strategies need before the first one is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lowrank.engine.merging import blamed, encode, read_updates
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.events import Event, SurveyRound
from mergekit_lowrank.executors import Executor, Job
from mergekit_lowrank.strategies import Survey

__all__ = ["run_surveys"]


@dataclass(frozen=True, eq=False)
class _Measured:
    """One module's measurement, and whose it is."""

    module: ModulePlan
    measurement: Any


def run_surveys(
    plan: Plan, executor: Executor, device: torch.device, tell: Callable[[Event], None]
) -> dict[str, Survey]:
    """The finished surveys by group; groups without one are absent.

    All groups go through their rounds together, so that a round reads each module once.
    """
    groups = {module.group.key: module.group for module in plan.modules}
    made = {key: group.strategy.survey() for key, group in groups.items()}
    surveys = {key: survey for key, survey in made.items() if survey is not None}
    unfinished, number = set(surveys), 0
    while unfinished:
        number += 1
        modules = [module for module in plan.modules if module.group.key in unfinished]
        totals: dict[str, Any] = {}
        jobs = [_job(plan, module, device, surveys[module.group.key]) for module in modules]
        for measured in executor.run(jobs, memory_bytes=plan.memory_bytes):
            key = measured.module.group.key
            totals[key] = totals[key] + measured.measurement if key in totals else measured.measurement
            tell(SurveyRound(measured.module.name, number, len(modules)))
        unfinished = {key for key in _in_order(totals, surveys) if surveys[key].conclude(totals[key])}
    return surveys


def _in_order(totals: dict[str, Any], surveys: dict[str, Survey]) -> Iterable[str]:
    return (key for key in surveys if key in totals)


def _job(plan: Plan, module: ModulePlan, device: torch.device, survey: Survey) -> Job[_Measured]:
    def measure(updates: Any) -> _Measured:
        with blamed(module):
            coordinates, context = encode(plan, module, updates, device, None)
            return _Measured(module, survey.measure(coordinates, context))

    return Job(module.name, module.peak_bytes, lambda: read_updates(plan, module), measure)
