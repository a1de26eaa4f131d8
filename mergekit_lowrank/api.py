"""The public functions: load a recipe, plan a merge, run it into a directory or into memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypedDict, overload

from typing_extensions import Unpack

from mergekit_lowrank.engine import (
    Parts,
    Plan,
    Shard,
    names_of_variants,
    select_devices,
)
from mergekit_lowrank.errors import MergeError, OutputError
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.formats import Checkpoint, empty_directory, new_directory, partial_path
from mergekit_lowrank.recipe import Outlines, parse_recipe
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report import Report
from mergekit_lowrank.requests import RecipeLike, as_recipe, executor_of, plans_of, refuse_below_one
from mergekit_lowrank.runs import Followers, MergedAdapter, Run, assemble, finished_event, prove, write_index
from mergekit_lowrank.verification import Means, Verification, verification_of

__all__ = ["MergedAdapter", "RecipeLike", "finalize", "merge", "plan", "plan_variants", "verify"]

NEEDS_FILES = {
    "shard": "where the processes that merge the other parts cannot read it",
    "verify": "and nothing would be left of it to verify the output with",
}
"""Why an input in memory does not go with an option."""


def plan(
    recipe: RecipeLike,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    executor: str | None = None,
    workers: int | None = None,
    strict: bool = False,
) -> Plan:
    """Everything a merge would do, from the headers of its inputs; no tensor is read.

    Args:
        recipe: a path, a mapping, or a ``Recipe``; without a sweep (see ``plan_variants``).
        registry: what there is to merge with; by default the built-ins and every installed plugin.
        memory_bytes: what the merge may hold; by default what the recipe says, or a quarter of the machine's memory.
        executor: how modules are scheduled; by default what the recipe says, or ``threads``.
        workers: modules that are merged at once; by default what the recipe says, or one for each processor.
        strict: whether a warning is an error.

    Raises:
        MergeError: every problem of the recipe, the inputs and the budget, together.
    """
    made = plan_variants(
        recipe, registry=registry, memory_bytes=memory_bytes, executor=executor, workers=workers, strict=strict
    )
    if list(made) != [""]:
        raise MergeError(f"this recipe is a sweep of {len(made)} variants; plan_variants plans each of them")
    return made[""]


def plan_variants(
    recipe: RecipeLike,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    executor: str | None = None,
    workers: int | None = None,
    strict: bool = False,
) -> dict[str, Plan]:
    """The plan of each variant of a sweep, by name; of a recipe without one its plan under the empty name.

    Args:
        recipe: a path, a mapping, or a ``Recipe``.
        registry: as for ``plan``.
        memory_bytes: as for ``plan``.
        executor: as for ``plan``.
        workers: as for ``plan``.
        strict: whether a warning is an error.

    Raises:
        MergeError: every problem of the recipe, the inputs and the budget, together.
    """
    registry, whole = registry or Registry.load(), as_recipe(recipe)
    scheduler = executor_of(registry, whole, executor, workers)
    with Outlines() as outlines:
        return plans_of(whole, registry, scheduler.workers, memory_bytes, strict=strict, download=outlines)


class MergeOptions(TypedDict, total=False):
    """Keyword arguments of ``merge``, for type checkers; their meaning and defaults stand there."""

    registry: Registry | None
    memory_bytes: int | None
    vram_bytes: int | None
    device: str | None
    executor: str | None
    workers: int | None
    overwrite: bool
    resume: bool
    shard: tuple[int, int] | None
    hash_sources: bool
    verify: bool
    strict: bool
    reporters: Sequence[Reporter]


@overload
def merge(recipe: RecipeLike, output: None = None, **options: Unpack[MergeOptions]) -> MergedAdapter: ...
@overload
def merge(recipe: RecipeLike, output: str | Path, **options: Unpack[MergeOptions]) -> Report | dict[str, Report]: ...
def merge(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    vram_bytes: int | None = None,
    device: str | None = None,
    executor: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    shard: tuple[int, int] | None = None,
    hash_sources: bool = True,
    verify: bool = False,
    strict: bool = False,
    reporters: Sequence[Reporter] = (),
) -> MergedAdapter | Report | dict[str, Report]:
    """Merge the inputs of a recipe, into a directory or into memory.

    What is left out here the recipe's ``execution`` says.

    Args:
        recipe: a path, a mapping, or a ``Recipe``. In the latter two a model may be an ``Adapter`` in memory.
        output: the directory to make, in one step once everything in it is complete; None for an adapter in memory.
        registry: what there is to merge with; by default the built-ins and every installed plugin.
        memory_bytes: what the merge may hold beside the interpreter and torch; by default a quarter of the machine's
            memory.
        vram_bytes: what it may hold on each GPU; by default what is free there.
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs), ``cuda:N`` or ``mps``; by default ``auto``.
        executor: how modules are scheduled: ``threads`` (default), ``processes``, ``serial``, or a plugin's.
        workers: modules that are merged at once; by default one for each processor.
        overwrite: whether what a merge left at ``output`` may be replaced; it stays until the new one is complete.
        resume: whether to go on with what an earlier merge of the same recipe had finished when it was cut off.
        shard: (i, n) to merge the i-th of n parts, for ``finalize`` to put together.
        hash_sources: whether the manifest holds the SHA-256 of every source file.
        verify: whether the output is verified before it is put in place, which merges a second time.
        strict: whether a warning is an error.
        reporters: followers of the merge, beside those of plugins.

    Returns:
        The report of a merge into a directory, by the variant's name where the recipe has a sweep; the
        ``MergedAdapter`` of a merge into memory.

    Raises:
        MergeError: what the recipe, the inputs, a plugin or the disk did wrong; nothing is left at ``output``.
    """
    registry, start, whole = registry or Registry.load(), time.perf_counter(), as_recipe(recipe)
    scheduler = executor_of(registry, whole, executor, workers)
    plans = plans_of(whole, registry, scheduler.workers, memory_bytes, strict=strict)
    followers = Followers([*reporters, *(cls() for cls in registry.reporters.values())])
    refuse_below_one(vram_bytes=vram_bytes)
    devices = select_devices(device or whole.execution.device or "auto")
    vram = vram_bytes or whole.execution.vram_bytes
    run = Run(plans, registry, scheduler, devices, vram, followers, strict, start)
    with followers, closing(scheduler):
        if output is None:
            if shard is not None:
                raise OutputError("a shard is a part of an output directory, and none is named; name the same for all")
            if verify:
                raise OutputError("what is verified are the files of an output directory, and none is named; name one")
            return run.into_memory()
        for made in plans.values():
            _check_output(Path(output), made)
        if shard is not None and verify:
            raise OutputError("a part of an output cannot be verified; finalize the parts with verify")
        if shard is not None:
            _refuse_memory_inputs(plans, "shard")
        if verify:
            _refuse_memory_inputs(plans, "verify")
        reports = run.into_directory(
            Path(output),
            overwrite=overwrite,
            resume=resume,
            shard=None if shard is None else _shard(*shard),
            hash_sources=hash_sources,
            verify=verify,
        )
    return reports[""] if list(reports) == [""] else reports


def finalize(
    output: str | Path,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    verify: bool = False,
    reporters: Sequence[Reporter] = (),
) -> Report | dict[str, Report]:
    """Put together the parts of a merge that ``merge(..., shard=(i, n))`` made, all of them checked first.

    Args:
        output: the directory that was given there.
        registry: what the parts were merged with.
        overwrite: whether what a merge left at ``output`` may be replaced.
        verify: whether the output is verified before it is put in place, which merges all of it again.
        reporters: followers, beside those of plugins.

    Returns:
        The report; by the variant's name where the recipe has a sweep.

    Raises:
        OutputError: parts are missing or damaged, or of different merges; they stay as they are.
    """
    registry, start, output = registry or Registry.load(), time.perf_counter(), Path(output)
    followers = Followers([*reporters, *(cls() for cls in registry.reporters.values())])
    if not partial_path(output.resolve()).is_dir():
        raise OutputError(f"{output}: has no parts. Make them with merge --shard 0/N to N-1/N.")
    with followers:
        with new_directory(output, overwrite=overwrite, resumes=True, keeps=lambda _: "") as partial:
            names = names_of_variants(partial)
            reports = {}
            for name in names:
                parts = Parts(partial / name)
                recipe = parse_recipe(parts.origin.recipe, name="recipe", directory=Path(parts.origin.directory))
                (made,) = plans_of(recipe, registry, 1, sys.maxsize, strict=False).values()  # nothing is merged
                reports[name] = assemble(parts, made, partial / name, output / name, registry, start)
            if reports.keys() != {""}:
                empty_directory(partial, but=names)
            write_index(partial, reports)
            if verify:
                scheduler = registry.executor("threads")()
                prove(partial, output, Means(registry, scheduler, select_devices("auto"), None, None, followers.tell))
        followers.tell(finished_event(output, time.perf_counter() - start, reports))
    return reports[""] if list(reports) == [""] else reports


def verify(
    output: str | Path,
    *,
    recompute: bool = True,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    device: str | None = None,
    executor: str | None = None,
    workers: int | None = None,
    reporters: Sequence[Reporter] = (),
) -> Verification:
    """What an output, its manifest and its inputs prove of each other. Nothing is written.

    Hashes of both, structure, finite values, lost updates and scaling; then the recipe that lies in the output is
    merged again, a module at a time, and compared with what is stored.

    Args:
        output: what ``merge``, ``resize`` or ``extract`` has made.
        recompute: whether to merge again; without it inputs that are not there are no fault.
        registry: what it was merged with; by default the built-ins and every installed plugin.
        memory_bytes: what may be held beside the interpreter and torch; by default a quarter of the machine's memory.
        device: as for ``merge``.
        executor: as for ``merge``.
        workers: as for ``merge``.
        reporters: followers; those of plugins follow merges only.

    Returns:
        All that was checked and every fault; ``is_ok`` where there is none.

    Raises:
        CheckpointError: it is not the output of a merge.
    """
    registry = registry or Registry.load()
    refuse_below_one(memory_bytes=memory_bytes, workers=workers)
    devices, scheduler = select_devices(device or "auto"), registry.executor(executor or "threads")(workers)
    with Followers(reporters) as followers, closing(scheduler):
        means = Means(registry, scheduler, devices, memory_bytes, None, followers.tell)
        return verification_of(Path(output), str(output), means, recomputes=recompute)


def _refuse_memory_inputs(plans: Mapping[str, Plan], option: str) -> None:
    for made in plans.values():
        for checkpoint in made.inputs:
            if not checkpoint.files:
                raise OutputError(
                    f"'{checkpoint.label}' is in memory, {NEEDS_FILES[option]}; save it to a directory and name that, "
                    f"or merge without {option}"
                )


def _shard(index: int, count: int) -> Shard:
    if not 0 <= index < count:
        raise MergeError(
            f"shard {index}/{count}: parts are counted from 0, so expected 0/{count} to {count - 1}/{count}"
        )
    return Shard(index, count)


def _check_output(output: Path, made: Plan) -> None:
    target = output.resolve()
    directories = {(_place(path, c).resolve(), f"input '{c.label}'") for c in made.inputs for path in c.files}
    if made.base is not None:
        directories.add((made.base.directory.resolve(), "base model"))
    for directory, what in sorted(directories):
        if target == directory or directory in target.parents:
            raise OutputError(f"the output {output} lies in the {what} ({directory}); choose another directory")
        if target in directory.parents:  # replacing it would delete the input
            raise OutputError(f"the output {output} holds the {what} ({directory}); choose another directory")


def _place(path: Path, checkpoint: Checkpoint) -> Path:
    """What the file of an input must not be written over with: its directory, unless the input is that one file."""
    return path if len(checkpoint.files) == 1 and path.suffix != ".json" else path.parent
