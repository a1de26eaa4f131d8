"""Writing safetensors whose header is known beforehand: in any order, from any thread, never whole in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats.tensors import DTYPES, TensorSpec

__all__ = ["SafetensorsStream"]

_ALIGNMENT_BYTES = 8  # of the data, as the safetensors library writes it


class SafetensorsStream:
    """A safetensors file with all of its space reserved, filled one tensor at a time, from any number of threads.

    As a context manager it closes the file on leaving; after an exception, or when the constructor fails, the
    unfinished file is left for the caller to delete.

    Args:
        path: the file to write; replaced if it exists.
        tensors: type and shape by name. Data lie in this order, wider types first so that each tensor is aligned.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        OutputError: the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
        header, self._offsets, self.total_bytes = _layout(self._specs, dict(metadata or {}))
        self._pending = set(self._specs)
        self._lock = threading.Lock()
        with self._disk_errors():
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with self._disk_errors():
                _reserve(self._fd, self.total_bytes, path)
                _write_all(self._fd, memoryview(header), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            ValueError: no such tensor, another type or shape than announced, or written before.
            OutputError: the disk is full or failed.
        """
        spec = self._specs.get(name)
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if spec != found:
            raise ValueError(f"tensor '{name}': announced as {spec}, given {found}")
        with self._lock:
            if name not in self._pending:
                raise ValueError(f"tensor '{name}' is written twice")
            self._pending.remove(name)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self._disk_errors():
            _write_all(self._fd, data, self._offsets[name])

    def close(self) -> None:
        """Flush to the disk and close.

        Raises:
            ValueError: a tensor was never written.
            OutputError: the disk failed.
        """
        try:
            if self._pending:
                raise ValueError(f"{len(self._pending)} tensors were never written, such as '{min(self._pending)}'")
            with self._disk_errors():
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            os.close(self._fd)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """What the operating system reports, as an ``OutputError`` that says how much room is needed."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}.") from error
            free_bytes = shutil.disk_usage(self.path.parent).free
            raise OutputError(
                f"{self.path}: the disk is full: {self.total_bytes:,} bytes are needed, {free_bytes:,} are free. "
                "Free some space or choose another output directory."
            ) from error


def _layout(specs: Mapping[str, TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, the position of each tensor in the file, and the file's size."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for key, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[key], end = end, end + spec.stored_bytes
        entries[key] = {"dtype": names[spec.dtype], "shape": spec.shape, "data_offsets": (begins[key], end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + begin for key, begin in begins.items()}, len(header) + end


def _reserve(fd: int, size_bytes: int, path: Path) -> None:
    """Give the file its size; where the file system can, with the blocks behind it."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except (AttributeError, OSError) as error:
        # macOS has no posix_fallocate and some file systems refuse it: what is free now is the best there is to know.
        if isinstance(error, OSError) and error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        if shutil.disk_usage(path.parent).free < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        os.ftruncate(fd, size_bytes)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
