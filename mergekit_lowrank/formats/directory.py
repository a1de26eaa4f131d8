"""Output directories that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats.peft_config import CONFIG_NAME

__all__ = ["new_directory"]


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A sibling ``.NAME.partial`` to write into, renamed to ``path`` on success and deleted on failure.

    Args:
        path: the directory to make; its parents are made too.
        overwrite: whether an adapter that lies there may be replaced. It stays in place until the new one is complete.

    Raises:
        OutputError: ``path`` exists and may not be replaced, or cannot be written.
    """
    _check_target(path, overwrite=overwrite)
    partial, replaced = (path.with_name(f".{path.name}.{role}") for role in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        partial.rename(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_target(path: Path, *, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"{path}: exists already. Choose another path, or allow it to be overwritten.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / CONFIG_NAME).is_file()):
        raise OutputError(
            f"{path}: is not an adapter, and is not overwritten. Choose another path, or remove it yourself."
        )
