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

__all__ = ["new_directory", "write_text"]

ADAPTER_FILES = (
    CONFIG_NAME,
    "README.md",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "artefacts.safetensors",
    "manifest.json",
    "recipe.yaml",
    "report.json",
)
"""What a merge or ``save_pretrained`` writes. A directory that holds anything else is never replaced."""


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A sibling ``.NAME.partial`` to write into, renamed to ``path`` on success and deleted on failure.

    What a killed run left behind is dealt with first: its partial directory is deleted, and a replacement that it did
    not finish is undone. A symbolic link is followed: what it names is replaced.

    Args:
        path: the directory to make; its parents are made too, and removed again on failure.
        overwrite: whether an adapter that lies there may be replaced. It stays in place until the new one is complete.

    Raises:
        OutputError: ``path`` exists and may not be replaced, cannot be written, or is being written by another merge.
    """
    target = _named(path)
    partial, replaced = (target.with_name(f".{target.name}.{role}") for role in ("partial", "replaced"))
    with _disk_errors(path):
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        _check_target(target, path, overwrite=overwrite)
        made = _make_parents(target)
    try:
        with _locked(partial, path):
            yield partial
            with _disk_errors(path):
                _flush(partial)
                _check_target(target, path, overwrite=overwrite)
                _swap(partial, target, replaced)
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # it is no longer empty: somebody else uses it
                parent.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file of the output.

    Raises:
        OutputError: the disk is full or failed.
    """
    with _disk_errors(path):
        path.write_text(text, encoding="utf-8")


def _named(path: Path) -> Path:
    """The path with links resolved and a name of its own."""
    target = path.resolve()
    if not target.name:
        raise OutputError(f"{path}: cannot be an output directory. Give the name of a new one.")
    return target


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error


def _check_target(target: Path, path: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{path}: exists already. Choose another path, or allow it to be overwritten (--overwrite).")
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    foreign = next((name for name in entries if name not in ADAPTER_FILES), None)
    if not target.is_dir() or foreign or (entries and CONFIG_NAME not in entries):
        what = f"holds '{foreign}', which no merge writes" if foreign else "is not an adapter"
        raise OutputError(f"{path}: {what}, and is not overwritten. Choose another path, or remove it yourself.")


def _make_parents(target: Path) -> list[Path]:
    """Make the directories above ``target``; those that were missing, outermost first."""
    missing = [parent for parent in reversed(target.parents) if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _swap(partial: Path, target: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of ``target``; what lay there comes back if that fails."""
    if not target.exists():
        partial.rename(target)
        _flush_directory(target.parent)
        return
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    _flush_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    """``partial``, made anew and locked while the context lasts; a killed process lets go of its lock."""
    with _disk_errors(path):
        if partial.exists():
            with _lock(partial):
                shutil.rmtree(partial)
        partial.mkdir()
    with _lock(partial):
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
