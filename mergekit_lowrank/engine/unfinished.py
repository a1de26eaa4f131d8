"""An output directory under way: what is in it already, and whether it can be gone on with."""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine.folding import FoldSink
from mergekit_lowrank.engine.journal import Journal, read_lines
from mergekit_lowrank.engine.pipeline import Destination, Done, Shard
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.sinks import Sink, adapter_sink
from mergekit_lowrank.engine.units import batches_of, files_together, share_of
from mergekit_lowrank.errors import CheckpointError, DiskError, InterruptedMergeError, causes
from mergekit_lowrank.formats import WORK_DIRECTORY, Checkpoint, empty_directory, writing
from mergekit_lowrank.recipe import Execution, Recipe
from mergekit_lowrank.registry import Registry

__all__ = ["Facts", "Unfinished", "drop_others", "first_changed", "identity_of", "inputs_of", "keeps", "open_sink"]

PACKAGES = ("torch", "numpy", "safetensors")
"""What decides the bytes of a result, beside this package and its plugins."""
DECISIVE_HOOKS = {"strategies", "spaces", "formats"}
"""What a plugin can change bytes with."""
TRANSIENT = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""Failures of a disk, a network or the memory, after which the same merge may succeed."""
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator")
"""In messages of torch's RuntimeErrors."""
JOURNAL = "journal.jsonl"
JOURNALS = "journal*.jsonl"
GO_ON = "The work so far is kept; run the same merge again to go on"


def keeps(directory: Path, error: BaseException) -> str | None:
    """How to go on with an unfinished output after an error; None where it is of no use.

    It is where something is finished and the error came from outside, so that the same merge may succeed later.

    Args:
        directory: with all that is unfinished.
        error: what ended the merge.
    """
    return GO_ON if _came_from_outside(error) and _has_finished(directory) else None


def _came_from_outside(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, DiskError | InterruptedMergeError):
        return True
    return any(_is_transient(cause) for cause in causes(error))


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in TRANSIENT
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


def _has_finished(directory: Path) -> bool:
    """Whether any journal tells of modules, or of a budget that is spent."""
    try:
        lines = (line for path in _journals_in(directory) for line in read_lines(path))
        return any("receipt" in line or "ranks" in line for line in lines)
    except (OSError, DiskError):  # the disk that failed may do better later
        return True


def _journals_in(directory: Path) -> list[Path]:
    """Of the output, or of all of its variants and parts."""
    return [*directory.rglob(f"{WORK_DIRECTORY}/{JOURNALS}")]


def drop_others(directory: Path, names: Iterable[str], notify: Callable[[str], None]) -> None:
    """Delete what a merge of other variants left in an unfinished output.

    Args:
        directory: with all that is unfinished.
        names: of the variants; one empty name for a merge without a sweep, to which everything there may belong.
        notify: told of what is deleted.
    """
    own = {*names}
    others = sorted({entry.name for entry in directory.iterdir()} - own) if own != {""} else []
    if others:
        notify(f"what an earlier run left in {directory} is not used: it is of other variants ({', '.join(others)})")
        empty_directory(directory, but=own)


def identity_of(plan: Plan, registry: Registry, devices: Iterable[str], shards: int | None) -> dict[str, Any]:
    """What must be the same for a merge to go on where another process stopped.

    Args:
        plan: of the merge.
        registry: what it is merged with.
        devices: kinds of what it is merged on.
        shards: how many processes share it; None where one makes it whole.

    Raises:
        CheckpointError: an input is gone.
    """
    plugins = {p.name: p.version for p in registry.plugins if not DECISIVE_HOOKS.isdisjoint(p.registers)}
    return {
        "mergekit_lowrank": __version__,
        "plugins": dict(sorted(plugins.items())),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "devices": sorted(set(devices)),
        "recipe": _absolute(plan).to_yaml(),
        "inputs": [_files_of(checkpoint) for checkpoint in plan.inputs],
        "base": plan.base.fingerprint if plan.base is not None else None,
        "shards": shards,
    }


def _absolute(plan: Plan) -> Recipe:
    """The recipe as it is understood from any directory, without what does not change its result."""
    models = []
    for entry, checkpoint in zip(plan.recipe.models, plan.inputs, strict=True):
        path = plan.recipe.directory / entry.model if isinstance(entry.model, str) else None
        local = path is not None and checkpoint.files and path.exists()
        models.append(entry.model_copy(update={"model": str(path.resolve())}) if local and path else entry)
    base = plan.recipe.base_model
    if base is not None and (plan.recipe.directory / base).exists():
        base = str((plan.recipe.directory / base).resolve())
    changes: dict[str, Any] = {"models": tuple(models), "base_model": base, "execution": Execution(), "sweep": {}}
    return plan.recipe.model_copy(update=changes)


def _files_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """Paths and sizes; of an input in memory something that is never the same again."""
    with _reading_inputs():
        files = [[str(path.resolve()), path.stat().st_size] for path in checkpoint.files]
    return files or [[uuid4().hex, 0]]


def inputs_of(plan: Plan) -> list[Path]:
    """The files of all inputs, and of the base where it is read."""
    base = plan.base.files if plan.base is not None else ()
    return list(dict.fromkeys([*(path for checkpoint in plan.inputs for path in checkpoint.files), *base]))


class Unfinished(Destination):
    """An output directory that is being filled, or one's share of it.

    Args:
        directory: of what is unfinished; made where it is missing.
        plan: what is merged.
        identity: of the merge (``identity_of``).
        apart: whether each module must have a file of its own until all are there.
        shard: which part of the merge goes into it; None for all.
        about: the whole, for whoever puts the parts together.
        resumes: whether to go on with what is there.
        digest: gives the SHA-256 of a file.
        notify: told what is gone on with, or why nothing is.

    Raises:
        DiskError: the disk is full or failed.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        identity: Mapping[str, Any],
        *,
        apart: bool,
        shard: Shard | None,
        about: Mapping[str, Any],
        resumes: bool,
        digest: Callable[[Path], str],
        notify: Callable[[str], None],
    ) -> None:
        self._directory, self._apart, self._shard, self._notify = directory, apart, shard, notify
        self._files, self._digest = inputs_of(plan), digest
        work = directory / WORK_DIRECTORY
        path = work / (JOURNAL if shard is None else f"journal-{shard.index}-of-{shard.count}.jsonl")
        facts = Facts.of(read_lines(path)) if resumes else Facts()
        reason = facts.why_not_resumed(identity, self._files, digest) if resumes else "it is not to be resumed"
        if reason is not None:
            self._start_over(path, reason)
            facts = Facts()
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path, identity)
        super().__init__(self._open_sink, ranks=facts.ranks)
        self._recorded, self._digests = facts.done, facts.digests
        self._times = _times_of(self._files)
        if self._times != facts.times:
            self._journal.append({"times": self._times})
        if shard is not None:
            self._journal.append({"about": about})

    @property
    def scratch(self) -> Path:
        """The directory of what is unfinished."""
        return self._directory / WORK_DIRECTORY

    def hashed(self, path: Path, digest: str) -> None:
        """An input has this SHA-256.

        Raises:
            CheckpointError: it had another one when some of the modules were merged.
        """
        name = str(path.resolve())
        known = self._digests.get(name)
        if known is None:
            self._digests[name] = digest
            self._journal.append({"file": name, "sha256": digest})
        elif known != digest:
            raise self._changed(path)

    def check_inputs(self) -> None:
        """That the inputs are what they were when the first module was merged.

        Raises:
            CheckpointError: one is not, or is gone.
        """
        path = first_changed(self._files, self._times, self._digests, self._digest)
        if path is not None:
            raise self._changed(path)

    def _changed(self, path: Path) -> CheckpointError:
        """The error that says so. Nothing is gone on with after it, even where others keep the directory."""
        self._journal.drop()
        return CheckpointError(f"{path}: changed while it was merged, so nothing of that can be used. Merge again.")

    def bought(self, ranks: Mapping[str, int]) -> None:
        """Remember what a budget bought."""
        self._journal.append({"ranks": dict(ranks)})

    def accept(self, done: Done) -> None:
        """Remember a module that is written."""
        self._journal.append(done.to_dict())

    def _open_sink(self, plan: Plan) -> Sink:
        sink = open_sink(self._directory, plan, self._shard, apart=self._apart)
        self.finished = [done for done in self._recorded if sink.holds(done.receipt)]
        if self.finished:
            total = len(plan.modules) + (len(plan.fold.copied) if plan.fold is not None else 0)
            self._notify(f"{len(self.finished)} of {total} tensors or modules are there already; going on")
        return sink

    def _start_over(self, journal: Path, reason: str) -> None:
        """Empty the directory; or delete one journal of it, where other processes use the rest."""
        used = [journal] if self._shard is not None else _journals_in(self._directory)
        if any(path.exists() for path in used):
            self._notify(f"what an earlier run left in {self._directory} is not used: {reason}")
        if self._shard is not None:
            with writing(journal):
                journal.unlink(missing_ok=True)
        elif self._directory.exists():
            empty_directory(self._directory)


def open_sink(directory: Path, plan: Plan, shard: Shard | None, *, apart: bool, creates: bool = True) -> Sink:
    """Where the modules of a plan go in a directory, or those of one of several processes.

    Args:
        directory: of what is unfinished.
        plan: what is merged.
        shard: which part of it; None for all.
        apart: whether each module must have a file of its own until all are there.
        creates: whether files of a model that are missing or damaged are made anew.
    """
    if plan.fold is None:
        return adapter_sink(directory, plan, apart=apart or shard is not None)
    fold = plan.fold
    if shard is not None:
        together = files_together(fold)
        own = {unit.file for batch in share_of(batches_of([plan]), shard.index, shard.count) for unit in batch}
        files = {name: header for name, header in fold.layout.files.items() if together[name] in own}
        fold = replace(fold, layout=replace(fold.layout, files=files))
    return FoldSink(directory, plan, fold, creates=creates)


@dataclass(frozen=True)
class Facts:
    """What a journal says.

    Attributes:
        identity: of the merge; empty where there is no journal.
        entries: what was written, the last of each module, as ``Done.to_dict`` gave it.
        ranks: what a budget bought.
        times: of the last change of each input, in nanoseconds.
        digests: SHA-256 of inputs, as far as they were hashed.
        about: the whole, of which this is a part.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    entries: Sequence[Mapping[str, Any]] = ()
    ranks: Mapping[str, int] | None = None
    times: Mapping[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Facts:
        """Of its lines."""
        identity, *others = [*lines] or [{}]
        entries = {line["receipt"]["module"]: line for line in others if "receipt" in line}
        ranks = [line["ranks"] for line in others if "ranks" in line]
        times = [line["times"] for line in others if "times" in line]
        digests = {line["file"]: line["sha256"] for line in others if "sha256" in line}
        abouts = [line["about"] for line in others if "about" in line]
        return cls(
            identity,
            [*entries.values()],
            ranks[-1] if ranks else None,
            times[-1] if times else {},
            digests,
            abouts[-1] if abouts else {},
        )

    @property
    def done(self) -> list[Done]:
        """What was written. Only of a journal of this version: another one may say it otherwise."""
        return [Done.from_dict(entry) for entry in self.entries]

    def why_not_resumed(
        self, identity: Mapping[str, Any], files: Sequence[Path], digest: Callable[[Path], str]
    ) -> str | None:
        """Why a merge of this identity cannot go on from here; None where it can."""
        if not self.identity:
            return "it is of no whole merge of one recipe"
        plain = json.loads(json.dumps(identity))
        if self.identity != plain:
            names = [name for name in plain if self.identity.get(name) != plain[name]]
            return f"it is of another merge (another {' and '.join(names) or 'version'})"
        path = first_changed(files, self.times, self.digests, digest)
        return None if path is None else f"the input {path} has changed"


def first_changed(
    files: Iterable[Path], times: Mapping[str, int], digests: Mapping[str, str], digest: Callable[[Path], str]
) -> Path | None:
    """The first file that is not what it was: by its time, and where that differs by its hash, if it is known."""
    now = _times_of(files)
    for name, time in now.items():
        if time != times.get(name) and (name not in digests or _hashed(Path(name), digest) != digests[name]):
            return Path(name)
    return None


def _times_of(files: Iterable[Path]) -> dict[str, int]:
    with _reading_inputs():
        return {str(path.resolve()): path.stat().st_mtime_ns for path in files}


def _hashed(path: Path, digest: Callable[[Path], str]) -> str:
    with _reading_inputs():
        return digest(path)


@contextmanager
def _reading_inputs() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.") from error
