"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats.peft_config import CONFIG_NAME

try:
    import fcntl
except ImportError:  # Windows has no flock: two merges into one directory are not noticed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["new_directory"]


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A sibling ``.NAME.partial`` to write into, renamed to ``path`` on success and deleted on failure.

    What a killed run left behind is dealt with first: its partial directory is deleted, and a replacement that it did
    not finish is undone.

    Args:
        path: the directory to make; its parents are made too.
        overwrite: whether an adapter that lies there may be replaced. It stays in place until the new one is complete.

    Raises:
        OutputError: ``path`` exists and may not be replaced, cannot be written, or is being written by another merge.
    """
    partial, replaced = (path.with_name(f".{path.name}.{role}") for role in ("partial", "replaced"))
    with _disk_errors(path):
        if replaced.exists() and not path.exists():
            replaced.rename(path)
    _check_target(path, overwrite=overwrite)
    with _disk_errors(path), _locked(partial):
        try:
            yield partial
            _flush(partial)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            partial.rename(path)
            _flush_directory(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error


def _check_target(path: Path, *, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"{path}: exists already. Choose another path, or allow it to be overwritten (--overwrite).")
    if not path.is_dir() or (any(path.iterdir()) and not (path / CONFIG_NAME).is_file()):
        raise OutputError(
            f"{path}: is not an adapter, and is not overwritten. Choose another path, or remove it yourself."
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """``partial``, made anew and locked while the context lasts; a killed process lets go of its lock."""
    if partial.exists():
        with _lock(partial):
            shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with _lock(partial):
        yield


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(
            f"{directory}: another merge is writing here. Wait for it, or choose another path."
        ) from error
    try:
        yield
    finally:
        os.close(handle)


def _flush(directory: Path) -> None:
    """Make sure that what the rename will show is on the disk."""
    for file in directory.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    with suppress(OSError):  # some file systems and Windows cannot
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
