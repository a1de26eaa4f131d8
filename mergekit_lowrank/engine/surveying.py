"""Passes over modules before the first one is merged: for methods, and budgets, that need to see all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from mergekit_lowrank.engine.devices import Device
from mergekit_lowrank.engine.memory import settle_allocator
from mergekit_lowrank.engine.merging import Encodings, blamed, context_of, encoding_key, on_disk, read_updates
from mergekit_lowrank.engine.placement import DevicePool, attempt
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.events import Event, SurveyRound
from mergekit_lowrank.executors import Executor, Job, Work
from mergekit_lowrank.lowrank import InputUpdate
from mergekit_lowrank.strategies import Survey

__all__ = ["Measure", "Rounds", "run_surveys"]

Measurement = TypeVar("Measurement")


class Measure(ABC, Generic[Measurement]):
    """Something small about a module, from its inputs; it can be pickled."""

    @abstractmethod
    def __call__(self, module: str, encodings: Encodings) -> Measurement:
        """The measurement of one module, by its name."""


class Rounds:
    """Reads modules before they are merged, counts how often, and tells of it.

    Args:
        plans: of the same inputs.
        executor: how modules are scheduled.
        pool: where they are looked at.
        scratch: a directory for matrices that are too large for memory.
        tell: takes each event.
        after: rounds that there have been already.
        stage: what modules are looked at for, in events.

    Attributes:
        number: of the last round, from 1.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        executor: Executor,
        pool: DevicePool,
        scratch: Path,
        tell: Callable[[Event], None],
        *,
        after: int = 0,
        stage: str = "survey",
    ) -> None:
        self._plans, self._executor, self._pool, self._scratch, self._tell = plans, executor, pool, scratch, tell
        self._stage, self.number = stage, after

    def run(self, modules: Sequence[str], measure: Measure[Measurement]) -> Iterator[tuple[str, Measurement]]:
        """One round: each module by name with its measurement, in any order."""
        self.number += 1
        work = _RoundWork(self._plans, modules, measure, self._pool, self._scratch)
        jobs = [Job(n, name, max(p.module(name).peak_bytes for p in self._plans)) for n, name in enumerate(modules)]
        memory_bytes = min(plan.modules_bytes for plan in self._plans)
        for n, measurement in self._executor.run(work, jobs, memory_bytes=memory_bytes):
            self._tell(SurveyRound(modules[n], self.number, len(modules), self._stage))
            yield modules[n], measurement


class _RoundWork(Work[list[InputUpdate], tuple[int, Measurement]]):
    def __init__(
        self,
        plans: Sequence[Plan],
        modules: Sequence[str],
        measure: Measure[Measurement],
        pool: DevicePool,
        scratch: Path,
    ) -> None:
        self._plans, self._modules, self._measure, self._pool, self._scratch = plans, modules, measure, pool, scratch

    def arrive(self, worker: int, workers: int) -> None:
        settle_allocator(self._plans, workers)
        self._pool = self._pool.of_worker(worker, workers)

    @property
    def needs_gpu(self) -> bool:
        return self._pool.has_gpus

    def read(self, job: Job) -> list[InputUpdate]:
        return read_updates(self._plans[0], self._plans[0].module(job.name))

    def run(self, job: Job, inputs: list[InputUpdate]) -> tuple[int, Measurement]:
        def measure(device: Device) -> Measurement:
            return self._measure(job.name, Encodings(inputs, device, are_kept=len(self._plans) > 1))

        scratch_bytes = max(plan.module(job.name).scratch_bytes for plan in self._plans)
        with on_disk(self._scratch, scratch_bytes):
            found, _ = attempt(self._pool, measure, need_bytes=job.peak_bytes + scratch_bytes)
        return job.index, found


class _Look(Measure[dict[tuple[int, str], Any]]):
    """What the surveys of a module's groups measure, by plan and group; those that are not finished."""

    def __init__(self, plans: Sequence[Plan], surveys: Mapping[tuple[int, str], Survey]) -> None:
        self._plans, self._surveys = plans, surveys

    def __call__(self, module: str, encodings: Encodings) -> dict[tuple[int, str], Any]:
        found = {}
        modules = [(n, plan, plan.module(module)) for n, plan in enumerate(self._plans)]
        for n, plan, own in sorted(modules, key=lambda entry: encoding_key(entry[1], entry[2])):
            survey = self._surveys.get((n, own.group.key))
            if survey is not None:
                with blamed(own):
                    found[n, own.group.key] = survey.measure(encodings.of(plan, own), context_of(plan, own, None))
        return found


def run_surveys(plans: Sequence[Plan], rounds: Rounds) -> list[dict[str, Survey]]:
    """The finished surveys of each plan by group; groups without one are absent.

    All groups of all plans go through their rounds together, so that a round reads each module once.
    """
    groups = {(n, m.group.key): m.group for n, plan in enumerate(plans) for m in plan.modules}
    made = {key: group.strategy.survey() for key, group in groups.items()}
    surveys = {key: survey for key, survey in made.items() if survey is not None}
    unfinished = dict(surveys)
    while unfinished:
        looked_at = [m.name for m in plans[0].modules if _is_looked_at(m.name, plans, unfinished)]
        totals: dict[tuple[int, str], Any] = {}
        for _, measurements in rounds.run(looked_at, _Look(plans, unfinished)):
            for key, measurement in measurements.items():
                totals[key] = totals[key] + measurement if key in totals else measurement
        unfinished = {key: survey for key, survey in unfinished.items() if survey.conclude(totals[key])}
    return [{group: survey for (own, group), survey in surveys.items() if own == n} for n in range(len(plans))]


def _is_looked_at(module: str, plans: Sequence[Plan], surveys: Mapping[tuple[int, str], Survey]) -> bool:
    return any((n, plan.module(module).group.key) in surveys for n, plan in enumerate(plans))
