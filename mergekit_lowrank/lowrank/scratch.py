"""Matrices that may be too large for the memory allowed: on disk then, where they are not anonymous memory."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mergekit_lowrank.errors import OutputError

__all__ = ["empty", "scratch_space"]

CHUNK_BYTES = 1 << 20
"""Of zeros that are written at once."""


@dataclass(frozen=True)
class _Space:
    """Where large matrices go, and which are large."""

    directory: Path
    above_bytes: int


_ACTIVE: ContextVar[_Space | None] = ContextVar("scratch_space", default=None)


@contextmanager
def scratch_space(directory: Path, above_bytes: int) -> Iterator[None]:
    """Within it, and in this thread, ``empty`` puts what is larger than ``above_bytes`` into files of ``directory``.

    The innermost of several counts. Tensors made within it may outlive it.
    """
    token = _ACTIVE.set(_Space(directory, above_bytes))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of any content: a mapped file on the CPU, within ``scratch_space`` and above its limit.

    The file has no name and all of its space is reserved; both are given back when the tensor goes. The kernel writes
    its pages back as it needs their memory.

    Raises:
        OutputError: the disk is full or failed.
    """
    space, size = _ACTIVE.get(), math.prod(shape) * dtype.itemsize
    if space is None or device.type != "cpu" or size <= max(space.above_bytes, 0):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_mapped(space.directory, size), dtype=dtype).view(shape)


def _mapped(directory: Path, size: int) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            _reserve(file, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        reason = "the disk is full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else error.strerror
        raise OutputError(
            f"{directory}: {reason}; a merged matrix of {size} bytes does not fit the memory allowed and needs as much "
            "space there. Free some, or allow more memory (execution.memory)"
        ) from error


def _reserve(file: IO[bytes], size: int) -> None:
    """Space for all of the file: a page without any behind it would end the process when it is written."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        # macOS has no posix_fallocate and some file systems refuse it: zeros take space too.
        if isinstance(error, OSError) and error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        for start in range(0, size, CHUNK_BYTES):
            file.write(bytes(min(CHUNK_BYTES, size - start)))
        file.flush()
