"""One merge under way: its plans run into a directory or into memory, its events told, its report written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank.engine import (
    ARTEFACT_FILE,
    Destination,
    Device,
    MemorySink,
    Origin,
    Outcome,
    Parts,
    Plan,
    Shard,
    Unfinished,
    adapter_config,
    count_modules,
    dialect_of,
    drop_others,
    finish,
    identity_of,
    keeps,
    open_sink,
    refuse_parts,
    run_plans,
    with_ranks,
)
from mergekit_lowrank.errors import OutputError, raise_together
from mergekit_lowrank.events import Event, MergeFailed, MergeFinished, MergeStarted, Notice, Reporter
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.filenames import SIDE_FILE
from mergekit_lowrank.formats import (
    INDEX_NAME,
    WORK_DIRECTORY,
    Adapter,
    PeftWriter,
    Whole,
    empty_directory,
    new_directory,
    partial_path,
    shared_directory,
    write_text,
)
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report import (
    Report,
    background_digests,
    build_report,
    index_of,
    sha256_of,
    write_texts,
)
from mergekit_lowrank.requests import refuse_warnings, writer_of
from mergekit_lowrank.verification import Means, verification_of

__all__ = ["Followers", "MergedAdapter", "Run", "assemble", "finished_event", "prove", "write_index"]


@dataclass(frozen=True, eq=False)
class MergedAdapter(Adapter):
    """An adapter in memory, as a merge made it.

    Attributes:
        report: what the merge did.
        artefacts: what the method returned beside the merged update, by ``<module>.<name>``; most return nothing.
    """

    report: Report
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)

    def fill(self, directory: Path) -> None:
        """The files of the adapter, and ``artefacts.safetensors`` where there are any."""
        super().fill(directory)
        if self.artefacts:
            save_file({name: tensor.contiguous() for name, tensor in self.artefacts.items()}, directory / ARTEFACT_FILE)


class Run:
    """One merge under way, of one recipe or of the variants of a sweep."""

    def __init__(
        self,
        plans: Mapping[str, Plan],
        registry: Registry,
        executor: Executor,
        devices: Sequence[Device],
        vram_bytes: int | None,
        followers: Followers,
        strict: bool,
        start: float,
    ) -> None:
        self._plans, self._registry, self._executor = plans, registry, executor
        self._devices, self._vram_bytes = devices, vram_bytes
        self._followers, self._strict, self._start = followers, strict, start

    def into_memory(self) -> MergedAdapter:
        """The adapter of a recipe without a sweep."""
        first = next(iter(self._plans.values()))
        if len(self._plans) > 1 or first.folds:
            what = "a model" if first.folds else f"{len(self._plans)} variants"
            raise OutputError(f"a merge into memory gives one adapter, and this recipe gives {what}; name an output")
        dialect = dialect_of(first.recipe)
        if dialect != PeftWriter.name:
            raise OutputError(
                f"a merge into memory gives PEFT's tensors, and this recipe asks for {dialect}; name an output"
            )
        if any(isinstance(own.layout, Whole) and own.layout.in_side_file for own in first.modules):
            raise OutputError(
                f"an input has {SIDE_FILE}, which an adapter in memory has no place for; name an output, or leave it "
                "out by extras: {from: base_model}"
            )
        sinks: list[MemorySink] = []

        def open_memory(made: Plan) -> MemorySink:
            sinks.append(MemorySink(made))
            return sinks[0]

        (outcome,) = self._merged([Destination(open_memory)], None)
        report = self._report(outcome)
        self._followers.tell(finished_event(None, self._seconds(), {"": report}))
        return MergedAdapter(
            sinks[0].state_dict, adapter_config(outcome.plan, outcome.ranks), report, sinks[0].artefacts
        )

    def into_directory(
        self, output: Path, *, overwrite: bool, resume: bool, shard: Shard | None, hash_sources: bool, verify: bool
    ) -> dict[str, Report]:
        """The reports by variant, once the directory is complete, and verified if asked; or this process's part is."""

        def advice(error: BaseException) -> str | None:
            return keeps(partial_path(output.resolve()), error)

        if shard is None and resume:
            refuse_parts(partial_path(output.resolve()), output)
        opened = (
            new_directory(output, overwrite=overwrite, resumes=True, keeps=advice)
            if shard is None
            else shared_directory(output, overwrite=overwrite, keeps=advice)
        )
        with opened as partial:
            if shard is None:
                drop_others(partial, self._plans, self._notify)
            unfinished = [
                self._unfinished(partial / name, name, resume, shard, hash_sources=hash_sources) for name in self._plans
            ]
            reports = self._filled(partial, output, unfinished, shard, hash_sources=hash_sources)
            if verify:
                prove(partial, output, self._means())
        self._followers.tell(finished_event(output, self._seconds(), reports))
        return reports

    def _unfinished(
        self, directory: Path, name: str, resume: bool, shard: Shard | None, *, hash_sources: bool
    ) -> Unfinished:
        made, kinds = self._plans[name], [device.torch.type for device in self._devices]
        origin = Origin(made.recipe.to_yaml(), str(made.recipe.directory.absolute()), tuple(self._plans), hash_sources)
        return Unfinished(
            directory,
            made,
            identity_of(made, self._registry, kinds, None if shard is None else shard.count),
            apart=shard is not None or not self._executor.shares_files,
            shard=shard,
            about=asdict(origin),
            resumes=resume,
            digest=sha256_of,
            notify=self._notify,
        )

    def _means(self) -> Means:
        memory_bytes = next(iter(self._plans.values())).memory_bytes
        return Means(
            self._registry, self._executor, self._devices, memory_bytes, self._vram_bytes, self._followers.tell
        )

    def _notify(self, message: str) -> None:
        self._followers.tell(Notice(message))

    def _filled(
        self, partial: Path, output: Path, unfinished: Sequence[Unfinished], shard: Shard | None, *, hash_sources: bool
    ) -> dict[str, Report]:
        made = next(iter(self._plans.values()))
        sources = list(dict.fromkeys(path for checkpoint in made.inputs for path in checkpoint.files))
        if shard is not None:  # each process hashes its share of them
            sources = sources[shard.index :: shard.count]

        def remember(path: Path, digest: str) -> None:
            for own in unfinished:
                own.hashed(path, digest)

        with background_digests(sources, enabled=hash_sources, found=remember) as digests:
            outcomes = self._merged(unfinished, shard)
            reports = dict(zip(self._plans, map(self._report, outcomes), strict=True))
            hashes = digests()
            for own in unfinished:
                own.check_inputs()
            if shard is not None:
                return reports
            for name, outcome in zip(self._plans, outcomes, strict=True):
                method = self._registry.method(outcome.plan.recipe.merge_method)
                writer = writer_of(outcome.plan, self._registry)
                write_texts(partial / name, output / name, outcome, reports[name], method, hashes, writer)
            write_index(partial, reports)
        return reports

    def _merged(self, destinations: Sequence[Destination], shard: Shard | None) -> list[Outcome]:
        tell, plans = self._followers.tell, [*self._plans.values()]
        tell(_started_event(plans, shard))
        return run_plans(
            plans,
            destinations,
            executor=self._executor,
            devices=self._devices,
            vram_bytes=self._vram_bytes,
            shard=shard,
            tell=tell,
            names=[*self._plans],
        )

    def _report(self, outcome: Outcome) -> Report:
        report = build_report(
            outcome.plan,
            outcome.records,
            outcome.ranks,
            wall_seconds=self._seconds(),
            warnings=self._followers.warnings,
        )
        if self._strict:
            refuse_warnings(report.warnings)
        return report

    def _seconds(self) -> float:
        return time.perf_counter() - self._start


def _started_event(plans: Sequence[Plan], shard: Shard | None) -> MergeStarted:
    first = plans[0]
    return MergeStarted(
        count_modules(plans, shard),
        first.bytes_read,
        ", ".join(dict.fromkeys(plan.recipe.merge_method for plan in plans)),
        tuple(checkpoint.label for checkpoint in first.inputs),
        first.recipe.model_dump(mode="json", exclude_none=True),
    )


def finished_event(location: Path | None, wall_seconds: float, reports: Mapping[str, Report]) -> MergeFinished:
    """What is told of a merge that ended well, with the totals of its reports."""
    totals = {name: report.totals.model_dump() for name, report in reports.items()}
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report.warnings)
    place = None if location is None else str(location)
    return MergeFinished(place, wall_seconds, totals[""] if [*totals] == [""] else totals, tuple(warnings))


def prove(directory: Path, output: Path, means: Means) -> None:
    """Verify an output before it is put in its place.

    Args:
        directory: where it is complete.
        output: where it will lie.
        means: what may be used.

    Raises:
        OutputError: every fault.
    """
    found = verification_of(directory, str(output), means, recomputes=True)
    raise_together(
        [OutputError(f"{output} does not verify, and is not put in place: {fault}") for fault in found.faults]
    )
    means.tell(Notice(f"verified: {found.summary}"))


def assemble(parts: Parts, made: Plan, directory: Path, output: Path, registry: Registry, start: float) -> Report:
    """One output out of its parts, all of them checked first.

    Args:
        parts: what the processes wrote.
        made: the plan that they followed.
        directory: where they wrote it.
        output: where it will lie.
        registry: what it was merged with.
        start: of the clock.

    Raises:
        OutputError: parts are missing or damaged, or something changed since they were made.
    """
    expected = identity_of(made, registry, parts.identity["devices"], parts.identity["shards"])
    changed = [name for name, value in expected.items() if value != parts.identity[name]]
    if changed:
        raise OutputError(f"{directory}: {' and '.join(changed)} changed since the parts were made; make them again.")
    parts.check(made, sha256_of)
    if parts.ranks is not None:
        made = with_ranks(made, parts.ranks)
    sink = open_sink(directory, made, None, apart=True, creates=False)
    try:
        done = parts.finished(made, sink)
        written = {} if made.fold is None else made.fold.layout.files
        empty_directory(directory, but={WORK_DIRECTORY, *written})  # of merges that were given up
        outcome = finish(made, sink, done)
    finally:
        sink.close()
    seconds = time.perf_counter() - start
    report = build_report(outcome.plan, outcome.records, outcome.ranks, wall_seconds=seconds)
    digests = _digests(made, parts) if parts.origin.hashes_sources else {}
    method, writer = registry.method(made.recipe.merge_method), writer_of(made, registry)
    write_texts(directory, output, outcome, report, method, digests, writer)
    return report


def _digests(made: Plan, parts: Parts) -> dict[Path, str]:
    """SHA-256 of all inputs, as the parts found them."""
    files = [path for checkpoint in made.inputs for path in checkpoint.files]
    return {path: parts.digests.get(str(path.resolve())) or sha256_of(path) for path in files}


class Followers:
    """The reporters of one merge. One that raises is heard no more, and the report says so; the merge goes on."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)
        self.warnings: list[str] = []

    def tell(self, event: Event) -> None:
        """Hand an event to every reporter."""
        self._each(lambda reporter: reporter.handle(event))

    def __enter__(self) -> Followers:
        """Follow what happens within."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tell of an error, and close the reporters: the merge ended, well or not."""
        if error is not None:
            self.tell(MergeFailed(str(error) or type(error).__name__))
        self.close()

    def close(self) -> None:
        """The merge ended, well or not."""
        self._each(lambda reporter: reporter.close())

    def _each(self, call: Callable[[Reporter], None]) -> None:
        for reporter in tuple(self._reporters):
            try:
                call(reporter)
            except Exception as error:  # noqa: PERF203 - whatever a reporter does, it is not the merge's fault
                self._reporters.remove(reporter)
                name = getattr(reporter, "name", type(reporter).__name__)
                self.warnings.append(f"reporter '{name}' failed and was left out: {type(error).__name__}: {error}")


def write_index(partial: Path, reports: Mapping[str, Report]) -> None:
    """Of a sweep, what lies where."""
    if list(reports) != [""]:
        write_text(partial / INDEX_NAME, index_of(reports))
