"""Output directories that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mergekit_lowrank.errors import DiskError, MergeError, OutputError
from mergekit_lowrank.formats.peft_config import CONFIG_NAME

try:
    import fcntl
except ImportError:  # Windows has no flock: two merges into one directory are not noticed there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "INDEX_NAME",
    "MANIFEST_NAME",
    "PAGE_NAME",
    "REPORT_NAME",
    "TIMINGS_NAME",
    "WORK_DIRECTORY",
    "empty_directory",
    "new_directory",
    "partial_path",
    "shared_directory",
    "write_text",
    "writing",
]

ADAPTER_FILES = (
    CONFIG_NAME,
    "README.md",
    "adapter_model.bin",
    "adapter_model.safetensors",
)
"""What ``save_pretrained`` writes. A directory that holds anything else is replaced only if a merge wrote it."""
MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.json"
TIMINGS_NAME = "timings.json"
PAGE_NAME = "report.html"
INDEX_NAME = "sweep.json"
"""Lists the directories that a sweep wrote."""
WORK_DIRECTORY = ".work"
"""Of an unfinished output, or of each variant in it: what is needed to go on with it, and gone at the end."""

LACKING_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks report: two merges into one directory are not noticed there."""


def _keeps_nothing(error: BaseException) -> str | None:
    del error
    return None


@contextmanager
def new_directory(
    path: Path,
    *,
    overwrite: bool = False,
    resumes: bool = False,
    keeps: Callable[[BaseException], str | None] = _keeps_nothing,
) -> Iterator[Path]:
    """A sibling ``.NAME.partial`` to write into, renamed to ``path`` on success and deleted on failure.

    What a killed run left behind is dealt with first: a replacement that it did not finish is undone, and its partial
    directory is emptied, unless this run ``resumes`` it. On success all files are flushed to the disk, then the
    ``WORK_DIRECTORY`` is deleted, and the rename comes last. A symbolic link is followed: what it names is replaced.

    Args:
        path: the directory to make; its parents are made too, and removed again on failure.
        overwrite: whether an adapter that lies there may be replaced. It stays in place until the new one is complete.
        resumes: whether a partial directory that is there is handed over with all that is in it.
        keeps: given an error, the sentence to end it with if the partial directory is to stay; None if it is not.

    Raises:
        OutputError: ``path`` exists and may not be replaced, or is being written by another merge.
        DiskError: it cannot be written.
    """
    target = _named(path)
    partial, replaced = partial_path(target), target.with_name(f".{target.name}.replaced")
    with writing(path):
        made = _make_parents(target)
    try:
        with _locked(partial, path):
            with writing(path):
                _settle(target, replaced)
                _check_target(target, path, overwrite=overwrite)
                if not resumes:
                    empty_directory(partial)
            with _told(keeps, partial):
                yield partial
                with writing(path):
                    _flush(partial)
                    _check_target(target, path, overwrite=overwrite)
                    _drop_work(partial)
            _swap(partial, target, replaced)
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # it is not empty: it holds what is kept, or somebody else uses it
                parent.rmdir()
        raise


@contextmanager
def _told(keeps: Callable[[BaseException], str | None], partial: Path | None) -> Iterator[None]:
    """Errors end with what ``keeps`` says of them; where it says None, ``partial`` is deleted."""
    try:
        yield
    except BaseException as error:
        said = keeps(error)
        if said is None and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if said and isinstance(error, MergeError | MemoryError | RuntimeError):
            error.args = (f"{str(error).rstrip('.')}. {said}" if str(error) else said,)
        raise


@contextmanager
def shared_directory(
    path: Path, *, overwrite: bool = False, keeps: Callable[[BaseException], str | None] = _keeps_nothing
) -> Iterator[Path]:
    """The ``.NAME.partial`` of ``path`` for one of several processes that fill it together; it stays as it is.

    Args:
        path: the directory to make.
        overwrite: whether an adapter that lies there may be replaced in the end.
        keeps: given an error, the sentence to end it with.

    Raises:
        OutputError: as ``new_directory``; also where a merge of one process is writing there.
        DiskError: it cannot be written.
    """
    target = _named(path)
    with writing(path):
        _check_target(target, path, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_path(target).mkdir(exist_ok=True)
    with _lock(partial_path(target), shared=True), _told(keeps, None):
        yield partial_path(target)


def partial_path(path: Path) -> Path:
    """Where what is unfinished of ``path`` lies."""
    return path.with_name(f".{path.name}.partial")


def empty_directory(directory: Path, *, but: Collection[str] = ()) -> None:
    """Delete all that lies in a directory, apart from these names.

    Raises:
        DiskError: something cannot be deleted.
    """
    with writing(directory):
        for entry in [entry for entry in directory.iterdir() if entry.name not in but]:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file of the output.

    Raises:
        DiskError: the disk is full or failed.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what the operating system reports is a ``DiskError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}.") from error


def _named(path: Path) -> Path:
    """The path with links resolved and a name of its own."""
    target = path.resolve()
    if not target.name:
        raise OutputError(f"{path}: cannot be an output directory. Give the name of a new one.")
    return target


def _check_target(target: Path, path: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{path}: exists already. Choose another path, or allow it to be overwritten (--overwrite).")
    foreign = _foreign(target)
    if foreign:
        raise OutputError(f"{path}: {foreign}, and is not overwritten. Choose another path, or remove it yourself.")


def _foreign(directory: Path) -> str | None:
    """Why the directory is not a merge's, nor an adapter's; None where it is, or is empty."""
    if not directory.is_dir():
        return "is not an adapter"
    names = sorted(entry.name for entry in directory.iterdir())
    if INDEX_NAME in names:
        others = [name for name in names if name != INDEX_NAME]
        return next((why for name in others if (why := _foreign(directory / name))), None)
    written = {MANIFEST_NAME, TIMINGS_NAME, PAGE_NAME, *_written_by(directory / MANIFEST_NAME)}
    known = written if MANIFEST_NAME in names else set(ADAPTER_FILES)
    strange = next((name for name in names if name not in known), None)
    if strange:
        return f"holds '{strange}', which no merge writes"
    return None if not names or CONFIG_NAME in names or MANIFEST_NAME in names else "is not an adapter"


def _written_by(manifest: Path) -> Iterator[str]:
    """The files that a merge lists as its own; of those in directories, these."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        outputs = json.loads(manifest.read_text(encoding="utf-8"))["outputs"]
        yield from (Path(entry["name"]).parts[0] for entry in outputs)


def _make_parents(target: Path) -> list[Path]:
    """Make the directories above ``target``; those that were missing, outermost first."""
    missing = [parent for parent in reversed(target.parents) if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _settle(target: Path, replaced: Path) -> None:
    """Undo a replacement that a killed run began; where only the old directory is left to be deleted, do that."""
    if not replaced.exists():
        return
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # the merge that made it may be doing the same
    else:
        replaced.rename(target)


def _swap(partial: Path, target: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of ``target``. If that fails, what lay there comes back, and both are left."""
    try:
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _flush_directory(target.parent)
    except BaseException as error:  # of an interrupt too
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if isinstance(error, OSError):
            raise DiskError(
                f"{target}: cannot be put in place: {error.strerror or error}. All of it is written: rename {partial} "
                "to it."
            ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    """``partial``, made and locked while the context lasts; after an error it goes again if there is nothing in it."""
    with writing(path), suppress(FileExistsError):
        partial.mkdir()
    with _lock(partial):
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it is not empty
                partial.rmdir()
            raise


@contextmanager
def _lock(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """A lock that a killed process lets go of."""
    if fcntl is None:
        yield
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with ExitStack() as stack:
        try:
            handle = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, handle)
            is_ours = _takes(handle, kind) and os.path.samestat(os.fstat(handle), directory.stat())
        except FileNotFoundError:  # another merge has just ended, as where it is another directory now
            is_ours = False
        except OSError as error:
            raise DiskError(f"{directory}: cannot be locked: {error.strerror}.") from error
        if not is_ours:
            raise OutputError(f"{directory}: another merge is writing here. Wait for it, or choose another path.")
        yield


def _takes(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LACKING_LOCKS:
            raise
    return True


def _flush(directory: Path) -> None:
    """Make sure that what the rename will show is on the disk."""
    for entry in directory.iterdir():
        if entry.is_dir():
            if entry.name != WORK_DIRECTORY:
                _flush(entry)
        else:
            with entry.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_directory(directory)


def _drop_work(directory: Path) -> None:
    """Let go of what only a resumed merge would need: all else is on the disk."""
    for work in [*directory.rglob(WORK_DIRECTORY)]:
        shutil.rmtree(work)
        _flush_directory(work.parent)


def _flush_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in {errno.EIO, errno.ENOSPC, errno.EDQUOT}:
            raise
        # Some file systems, and Windows, cannot.
