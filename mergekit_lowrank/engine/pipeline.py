"""Planned merges of the same inputs, run: surveys first, then every module through read, merge and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from mergekit_lowrank.engine.budgeting import buys_ranks, spend_budget, with_ranks
from mergekit_lowrank.engine.devices import Device
from mergekit_lowrank.engine.memory import settle_allocator
from mergekit_lowrank.engine.merging import Encodings, encoding_key, merge_module, on_disk, read_updates
from mergekit_lowrank.engine.placement import DevicePool, attempt
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.records import ModuleRecord
from mergekit_lowrank.engine.sinks import Receipt, Sink, factored_ranks
from mergekit_lowrank.engine.surveying import Rounds, run_surveys
from mergekit_lowrank.engine.units import Unit, batches_of, share_of
from mergekit_lowrank.events import Event, MergeResumed, ModuleMerged
from mergekit_lowrank.executors import Executor, Job, Work
from mergekit_lowrank.lowrank import InputUpdate
from mergekit_lowrank.strategies import Survey

__all__ = ["Destination", "Done", "Outcome", "Shard", "count_modules", "finish", "run_plans"]

MEASURES = (
    "energy",
    "kept_energy",
    "cut_error",
    "merged_norm",
    "scale",
    "retention",
    "relative_error",
    "sign_conflict",
)
"""Fields of a record that are told with the module: one number each."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that share a merge.

    Attributes:
        index: of this one, from 0.
        count: of all.
    """

    index: int
    count: int


@dataclass(frozen=True, eq=False)
class Done:
    """One module that is merged and written.

    Attributes:
        receipt: what was written.
        record: what there is to say about it; None for a tensor that was only copied.
    """

    receipt: Receipt
    record: ModuleRecord | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"receipt": self.receipt.to_dict(), "record": self.record and self.record.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Done:
        """What ``to_dict`` gave, after a way through JSON."""
        return cls(Receipt(**data["receipt"]), data["record"] and ModuleRecord.from_dict(data["record"]))


class Destination:
    """Where one output goes, and what is remembered of it should this process end.

    Args:
        open_sink: given the plan with all ranks that a budget buys.
        ranks: what a budget bought in an earlier process.
        finished: what earlier processes wrote.
    """

    def __init__(
        self,
        open_sink: Callable[[Plan], Sink],
        *,
        ranks: Mapping[str, int] | None = None,
        finished: Sequence[Done] = (),
    ) -> None:
        self.open_sink, self.ranks, self.finished = open_sink, ranks, finished

    def bought(self, ranks: Mapping[str, int]) -> None:
        """A budget is spent."""

    def accept(self, done: Done) -> None:
        """A module is written."""

    @property
    def scratch(self) -> Path:
        """A directory for matrices that are too large for memory."""
        return Path(gettempdir())


@dataclass(frozen=True, eq=False)
class Outcome:
    """One output that is complete but for its texts.

    Attributes:
        plan: with all ranks known.
        sink: finished.
        ranks: of each module with factors as written.
        records: of each module, in the plan's order.
        receipts: of each module and copied tensor.
    """

    plan: Plan
    sink: Sink
    ranks: Mapping[str, int]
    records: tuple[ModuleRecord, ...]
    receipts: Mapping[str, Receipt]


@dataclass(frozen=True, eq=False)
class Target:
    """One output, as workers know it.

    Attributes:
        plan: what is merged.
        sink: where it goes.
        surveys: by group.
        scratch: a directory for large matrices.
        finished: units that are there already.
    """

    plan: Plan
    sink: Sink
    surveys: Mapping[str, Survey]
    scratch: Path
    finished: frozenset[str]


class MergeWork(Work[list[InputUpdate] | None, list[tuple[int, Done]]]):
    """Merges modules, each for every target; or copies tensors of the base.

    Args:
        targets: of the same inputs.
        batches: the units of each job.
        pool: where modules are merged.
        flushes: whether what a job wrote must be on the disk when it is done, for other machines to see.
    """

    def __init__(
        self, targets: Sequence[Target], batches: Sequence[Sequence[Unit]], pool: DevicePool, *, flushes: bool
    ) -> None:
        self._targets, self._batches, self._pool, self._flushes = targets, batches, pool, flushes

    def arrive(self, worker: int, workers: int) -> None:
        """Take one of the devices."""
        settle_allocator([target.plan for target in self._targets], workers)
        self._pool = self._pool.of_worker(worker, workers)

    @property
    def needs_gpu(self) -> bool:
        """Whether modules are merged on GPUs."""
        return self._pool.has_gpus

    def read(self, job: Job) -> list[InputUpdate] | None:
        """The inputs of a job of one module; those of others are read one after the other as they are merged."""
        batch = self._batches[job.index]
        return self._inputs(batch[0]) if len(batch) == 1 else None

    def run(self, job: Job, inputs: list[InputUpdate] | None) -> list[tuple[int, Done]]:
        """What was written, for each target by its number."""
        batch = self._batches[job.index]
        read = {batch[0].name: inputs} if len(batch) == 1 else {}
        found = [done for unit in batch for done in self._unit(unit, read.pop(unit.name, None) or self._inputs(unit))]
        if self._flushes:
            for target in self._targets:
                target.sink.flush()
        return found

    def _inputs(self, unit: Unit) -> list[InputUpdate] | None:
        plan = self._targets[0].plan
        return None if unit.is_copy else read_updates(plan, plan.module(unit.name))

    def _unit(self, unit: Unit, inputs: list[InputUpdate] | None) -> list[tuple[int, Done]]:
        waiting = [(n, target) for n, target in enumerate(self._targets) if unit.name not in target.finished]
        if inputs is None:
            return [(n, Done(target.sink.copy(unit.name), None)) for n, target in waiting]
        modules = [(n, target, target.plan.module(unit.name)) for n, target in waiting]
        modules.sort(key=lambda entry: encoding_key(entry[1].plan, entry[2]))

        def merge(device: Device) -> list[tuple[int, Done]]:
            encodings = Encodings(inputs, device, are_kept=len(modules) > 1)
            return [(n, _merged(target, module, encodings)) for n, target, module in modules]

        found, told = attempt(self._pool, merge, need_bytes=unit.peak_bytes + unit.scratch_bytes)
        return [(n, _with_warnings(done, told)) for n, done in found] if told else found


def _merged(target: Target, module: ModulePlan, encodings: Encodings) -> Done:
    with on_disk(target.scratch, module.scratch_bytes):
        merged = merge_module(target.plan, module, encodings, target.surveys.get(module.group.key))
        return Done(target.sink.put(module.name, merged.update, merged.artefacts), merged.record)


def _with_warnings(done: Done, told: Sequence[str]) -> Done:
    assert done.record is not None  # noqa: S101 - a module was merged
    return replace(done, record=replace(done.record, warnings=(*done.record.warnings, *told)))


def run_plans(
    plans: Sequence[Plan],
    destinations: Sequence[Destination],
    *,
    executor: Executor,
    devices: Sequence[Device],
    vram_bytes: int | None = None,
    shard: Shard | None = None,
    tell: Callable[[Event], None],
    names: Sequence[str] = (),
) -> list[Outcome]:
    """Merge every module of every plan, each input of a module read once; one outcome for each plan.

    Args:
        plans: of the same inputs, such as the variants of a sweep.
        destinations: one for each.
        executor: how modules are scheduled.
        devices: where they are merged.
        vram_bytes: what may be held on each device.
        shard: which part of the modules is merged; None for all. The sink of a part is not finished.
        tell: takes each event.
        names: of the plans, for events; none where there is one plan.

    Raises:
        MergeError: whatever an input, a strategy or the disk does wrong. Modules in flight are waited for.
    """
    settle_allocator(plans, executor.workers)
    pool = DevicePool(devices, vram_bytes)
    with ExitStack() as stack:
        opening = [_Opening(plan, destination, stack) for plan, destination in zip(plans, destinations, strict=True)]
        rounds = Rounds(plans, executor, pool, destinations[0].scratch, tell)
        surveys = run_surveys([own.plan for own in opening], rounds)
        targets = []
        for own, found in zip(opening, surveys, strict=True):
            rounds = Rounds([own.plan], executor, pool, destinations[0].scratch, tell, after=rounds.number)
            targets.append(own.target(found, rounds))
        done: list[dict[str, Done]] = [{d.receipt.module: d for d in own.finished} for own in destinations]
        finished = sum(item.record is not None for own in done for item in own.values())
        if finished:
            tell(MergeResumed(finished))
        for number, item in _run(targets, executor, pool, shard):
            destinations[number].accept(item)
            done[number][item.receipt.module] = item
            if item.record is not None:
                tell(_merged_event(item.record, names[number] if names else ""))
        complete = _part if shard is not None else finish
        return [complete(target.plan, target.sink, own) for target, own in zip(targets, done, strict=True)]


def _merged_event(record: ModuleRecord, variant: str) -> ModuleMerged:
    measures = {name: getattr(record, name) for name in MEASURES}
    return ModuleMerged(record.module, record.rank, record.wall_seconds, measures, variant)


def count_modules(plans: Sequence[Plan], shard: Shard | None) -> int:
    """How many modules are merged for all plans of the same inputs: all of them, or those of one part."""
    batches = batches_of(plans)
    if shard is not None:
        batches = share_of(batches, shard.index, shard.count)
    return len(plans) * sum(not unit.is_copy for batch in batches for unit in batch)


class _Opening:
    """One output on its way to be a target. Its sink is opened before anything is read where ranks allow it.

    So a full disk is noticed then.
    """

    def __init__(self, plan: Plan, destination: Destination, stack: ExitStack) -> None:
        self.plan = plan if destination.ranks is None else with_ranks(plan, destination.ranks)
        self._destination, self._stack = destination, stack
        self._sink = None if buys_ranks(self.plan) else self._opened()

    def _opened(self) -> Sink:
        sink = self._destination.open_sink(self.plan)
        self._stack.callback(sink.close)
        return sink

    def target(self, surveys: Mapping[str, Survey], rounds: Rounds) -> Target:
        """The target, once the modules are surveyed; a budget is spent."""
        if self._sink is None:
            ranks = spend_budget(self.plan, surveys, rounds)
            self._destination.bought(ranks)
            self.plan = with_ranks(self.plan, ranks)
            self._sink = self._opened()
        finished = frozenset(done.receipt.module for done in self._destination.finished)
        return Target(self.plan, self._sink, surveys, self._destination.scratch, finished)


def _run(
    targets: Sequence[Target], executor: Executor, pool: DevicePool, shard: Shard | None
) -> Iterator[tuple[int, Done]]:
    batches = batches_of([target.plan for target in targets])
    if shard is not None:
        batches = share_of(batches, shard.index, shard.count)
    if executor.shares_files:
        batches = [[unit] for batch in batches for unit in batch]
    else:  # nothing that this process still holds back may come over what others write
        for target in targets:
            target.sink.flush()
    missing = [[u for u in batch if any(u.name not in t.finished for t in targets)] for batch in batches]
    batches = [batch for batch in missing if batch]
    work = MergeWork(targets, batches, pool, flushes=not executor.shares_files)
    jobs = [Job(n, batch[0].name, max(unit.peak_bytes for unit in batch)) for n, batch in enumerate(batches)]
    for results in executor.run(work, jobs, memory_bytes=min(target.plan.modules_bytes for target in targets)):
        yield from results


def finish(plan: Plan, sink: Sink, done: Mapping[str, Done]) -> Outcome:
    """The outcome of a plan whose modules are all merged, by name, and in the sink."""
    receipts = {module.name: done[module.name].receipt for module in plan.modules}
    if plan.fold is not None:
        receipts |= {key: done[key].receipt for key in plan.fold.copied}
    records = tuple(record for module in plan.modules if (record := done[module.name].record) is not None)
    return Outcome(plan, sink, sink.finish(receipts), records, receipts)


def _part(plan: Plan, sink: Sink, done: Mapping[str, Done]) -> Outcome:
    """The outcome of some of the modules."""
    records = tuple(own.record for own in done.values() if own.record is not None)
    ranks = {} if plan.folds else factored_ranks({name: own.receipt.rank for name, own in done.items()}, plan)
    return Outcome(plan, sink, ranks, records, {name: own.receipt for name, own in done.items()})
