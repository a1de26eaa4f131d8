"""What several processes made of one merge, put together once all of it is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine.journal import read_lines
from mergekit_lowrank.engine.pipeline import Done
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.sinks import Sink
from mergekit_lowrank.engine.unfinished import Facts, first_changed, inputs_of
from mergekit_lowrank.engine.units import batches_of, share_of
from mergekit_lowrank.errors import MergeError, OutputError, raise_together
from mergekit_lowrank.formats import WORK_DIRECTORY

__all__ = ["Origin", "Parts", "names_of_variants", "refuse_parts"]

READ_AT_ONCE = 4
"""Modules, or tensors, when they are compared with what was written."""
JOURNAL_OF_PART = re.compile(r"journal-(?P<index>\d+)-of-(?P<count>\d+)\.jsonl")


@dataclass(frozen=True)
class Origin:
    """What a part says of the whole, so that the parts alone are enough to put it together.

    Attributes:
        recipe: of this output, as it was given.
        directory: what relative paths in it start from.
        variants: the names of all outputs of the merge, in order.
        hashes_sources: whether the manifest is to hold the SHA-256 of every source file.
    """

    recipe: str
    directory: str
    variants: tuple[str, ...]
    hashes_sources: bool


class Parts:
    """The parts of one output; of several sets of them, those made last.

    Args:
        directory: of the unfinished output.

    Attributes:
        identity: of the merge.
        origin: of it.
        ranks: what a budget bought; None without one.
        digests: SHA-256 of the inputs that were hashed, by path.

    Raises:
        OutputError: there are no parts, some are missing, or belong to another merge.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._facts = _chosen(directory, _found(directory))
        first = self._facts[0]
        self.identity = first.identity
        if self.identity["mergekit_lowrank"] != __version__:
            raise OutputError(
                f"{directory}: its parts were made by version {self.identity['mergekit_lowrank']}, and this is "
                f"{__version__}. Finalize with that version, or make them again."
            )
        self.origin = Origin(**{**first.about, "variants": tuple(first.about["variants"])})
        self.ranks = first.ranks
        self.digests = {path: digest for facts in self._facts for path, digest in facts.digests.items()}

    def check(self, plan: Plan, digest: Callable[[Path], str]) -> None:
        """That all were made of the inputs that are there now, and bought the same ranks.

        Args:
            plan: what is merged.
            digest: gives the SHA-256 of a file.

        Raises:
            OutputError: some were not; all of them.
        """
        raise_together([*self._strangers(plan, digest)])

    def _strangers(self, plan: Plan, digest: Callable[[Path], str]) -> Iterator[MergeError]:
        for index, facts in enumerate(self._facts):
            path, count = first_changed(inputs_of(plan), facts.times, facts.digests, digest), len(self._facts)
            if path is not None:
                yield self._again([index], f"the input {path} has changed since part {index} was made")
            elif facts.ranks != self.ranks:
                yield OutputError(
                    f"{self._directory}: part {index} shares out the budget otherwise than part 0, as machines of "
                    f"another kind may. Run merge --shard {index}/{count} --no-resume on one like that of part 0."
                )

    def finished(self, plan: Plan, sink: Sink) -> dict[str, Done]:
        """All modules and copied tensors by name, each as it was written.

        Raises:
            OutputError: some are missing, or damaged.
        """
        done = {own.receipt.module: own for facts in self._facts for own in facts.done}
        batches, count = batches_of([plan]), len(self._facts)
        owners = {
            unit.name: index for index in range(count) for batch in share_of(batches, index, count) for unit in batch
        }
        with ThreadPoolExecutor(READ_AT_ONCE, "check") as pool:
            are_held = pool.map(lambda name: name in done and sink.holds(done[name].receipt), owners)
            lacking = [name for name, is_held in zip(owners, are_held, strict=True) if not is_held]
        if lacking:
            why = "is not what was written" if lacking[0] in done else "is not merged yet"
            raise self._again(sorted({owners[name] for name in lacking}), f"'{lacking[0]}' {why}")
        return done

    def _again(self, indices: Sequence[int], why: str) -> OutputError:
        return _again(self._directory, indices, len(self._facts), why)


def refuse_parts(directory: Path, output: Path) -> None:
    """Raise OutputError where parts of a merge lie, which a whole merge would replace."""
    if directory.is_dir() and any(JOURNAL_OF_PART.fullmatch(path.name) for path in directory.rglob("*.jsonl")):
        raise OutputError(
            f"{output}: {directory} holds parts of a merge (--shard). Put them together with finalize, or merge with "
            "--no-resume to replace them."
        )


def names_of_variants(directory: Path) -> tuple[str, ...]:
    """The outputs of which the parts lie in a directory: one empty name, or the variants of a sweep.

    Raises:
        OutputError: as ``Parts``.
    """
    journals = [*_journals(directory), *(path for entry in directory.iterdir() for path in _journals(entry))]
    newest = max(journals, key=lambda path: path.stat().st_mtime_ns, default=directory / WORK_DIRECTORY / "none")
    return Parts(newest.parent.parent).origin.variants


@dataclass(frozen=True)
class _Part:
    """One journal: of which part it is, what it says, and when it was written."""

    index: int
    count: int
    facts: Facts
    time: int


def _journals(directory: Path) -> Iterator[Path]:
    work = directory / WORK_DIRECTORY
    if work.is_dir():
        yield from (path for path in sorted(work.iterdir()) if JOURNAL_OF_PART.fullmatch(path.name))


def _found(directory: Path) -> Iterator[_Part]:
    for path in _journals(directory):
        match, facts = JOURNAL_OF_PART.fullmatch(path.name), Facts.of(read_lines(path))
        if match and facts.about:
            yield _Part(int(match["index"]), int(match["count"]), facts, path.stat().st_mtime_ns)


def _chosen(directory: Path, found: Iterator[_Part]) -> list[Facts]:
    """Every part of one merge, in order."""
    parts = sorted(found, key=lambda part: -part.time)
    if not parts:
        raise OutputError(f"{directory}: holds no parts. Make them with merge --shard 0/N to N-1/N.")
    for newest in parts:
        alike = {part.index: part.facts for part in parts if part.facts.identity == newest.facts.identity}
        if len(alike) == newest.count:
            return [alike[index] for index in range(newest.count)]
    raise _incomplete(directory, parts[0], parts)


def _incomplete(directory: Path, newest: _Part, parts: Sequence[_Part]) -> OutputError:
    """What is wrong with the set of the newest part."""
    begun = {part.index: part.facts.identity for part in parts if part.count == newest.count}
    whys: dict[int, str] = {}
    for index in range(newest.count):
        own = begun.get(index, {})
        differing = " and ".join(name for name, value in newest.facts.identity.items() if own.get(name) != value)
        if index not in begun:
            whys[index] = f"part {index} is missing"
        elif differing:
            whys[index] = f"part {index} is of another merge than part {newest.index}: they differ in {differing}"
    return _again(directory, list(whys), newest.count, next(iter(whys.values())))


def _again(directory: Path, indices: Sequence[int], count: int, why: str) -> OutputError:
    more = f" (and {len(indices) - 1} more parts are not complete)" if len(indices) > 1 else ""
    commands = ", ".join(f"merge --shard {index}/{count}" for index in indices)
    return OutputError(f"{directory}: {why}{more}. Run {commands}, then finalize again.")
