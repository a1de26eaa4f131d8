"""A planned merge, run: surveys first, then every module through read, merge and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from mergekit_lowrank.engine.budgeting import spend_budget
from mergekit_lowrank.engine.devices import prepare
from mergekit_lowrank.engine.memory import recycle_freed_memory
from mergekit_lowrank.engine.merging import ModuleRecord, merge_module, read_updates
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.sinks import Sink
from mergekit_lowrank.engine.surveying import Rounds, run_surveys
from mergekit_lowrank.events import Event, ModuleMerged
from mergekit_lowrank.executors import Executor, Job
from mergekit_lowrank.strategies import Survey

__all__ = ["run_plan"]

AnySink = TypeVar("AnySink", bound=Sink)


def run_plan(
    plan: Plan,
    open_sink: Callable[[Plan], AnySink],
    *,
    executor: Executor,
    device: torch.device,
    tell: Callable[[Event], None],
) -> tuple[list[ModuleRecord], AnySink]:
    """Merge every module; the records in the plan's order, and the complete output.

    Args:
        plan: what to do.
        open_sink: the output of a plan whose ranks are as they will be: before anything is read, or after a budget is
            spent.
        executor: how modules are scheduled.
        device: where they are merged.
        tell: takes each event.

    Raises:
        MergeError: whatever an input, a strategy or the disk does wrong. Modules in flight are waited for.
    """
    prepare(device)
    recycle_freed_memory()
    rounds = Rounds(plan, executor, tell)
    with ExitStack() as stack:
        if plan.budget_bytes is None:
            stack.enter_context(sink := open_sink(plan))
            surveys = run_surveys(plan, rounds, device)
        else:
            surveys = run_surveys(plan, rounds, device)
            plan = spend_budget(plan, plan.budget_bytes, surveys, rounds, device)
            stack.enter_context(sink := open_sink(plan))
        records = {}
        jobs = [_job(plan, module, sink, device, surveys) for module in plan.modules]
        for record in executor.run(jobs, memory_bytes=plan.memory_bytes):
            records[record.module] = record
            tell(ModuleMerged(record.module, record.rank, record.wall_seconds))
    return _in_order(plan.modules, records), sink


def _in_order(modules: Sequence[ModulePlan], records: Mapping[str, ModuleRecord]) -> list[ModuleRecord]:
    return [records[module.name] for module in modules]


def _job(
    plan: Plan, module: ModulePlan, sink: Sink, device: torch.device, surveys: Mapping[str, Survey]
) -> Job[ModuleRecord]:
    def work(updates: Any) -> ModuleRecord:
        merged = merge_module(plan, module, updates, device, surveys.get(module.group.key))
        sink.put(merged.name, merged.b, merged.a)
        if merged.artefacts:
            sink.keep(merged.name, merged.artefacts)
        return merged.record

    return Job(module.name, module.peak_bytes, lambda: read_updates(plan, module), work)
