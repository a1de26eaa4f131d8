"""A planned merge, run: surveys first, then every module through read, merge and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mergekit_lowrank.engine.merging import ModuleRecord, merge_module, read_updates
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.sinks import Sink
from mergekit_lowrank.engine.surveying import run_surveys
from mergekit_lowrank.events import Event, ModuleMerged
from mergekit_lowrank.executors import Executor, Job
from mergekit_lowrank.strategies import Survey

__all__ = ["run_plan"]


def run_plan(
    plan: Plan, sink: Sink, *, executor: Executor, device: torch.device, tell: Callable[[Event], None]
) -> list[ModuleRecord]:
    """Merge every module into ``sink``; the records in the plan's order.

    Raises:
        MergeError: whatever an input, a strategy or the disk does wrong. Modules in flight are waited for.
    """
    surveys = run_surveys(plan, executor, device, tell)
    jobs = [_job(plan, module, sink, device, surveys) for module in plan.modules]
    records = {}
    for record in executor.run(jobs, memory_bytes=plan.memory_bytes):
        records[record.module] = record
        tell(ModuleMerged(record.module, record.rank, record.wall_seconds))
    return _in_order(plan.modules, records)


def _in_order(modules: Sequence[ModulePlan], records: Mapping[str, ModuleRecord]) -> list[ModuleRecord]:
    return [records[module.name] for module in modules]


def _job(
    plan: Plan, module: ModulePlan, sink: Sink, device: torch.device, surveys: Mapping[str, Survey]
) -> Job[ModuleRecord]:
    def work(updates: Any) -> ModuleRecord:
        merged = merge_module(plan, module, updates, device, surveys.get(module.group.key))
        sink.put(merged.name, merged.b, merged.a)
        return merged.record

    return Job(module.name, module.peak_bytes, lambda: read_updates(plan, module), work)
