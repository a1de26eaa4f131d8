"""Writing safetensors whose header is known beforehand: in any order, from any thread, never whole in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError, DiskError, OutputError
from mergekit_lowrank.formats.tensors import DTYPES, TensorSpec

__all__ = ["SafetensorsHeader", "SafetensorsStream", "bytes_of", "disk_error", "disk_errors"]

_ALIGNMENT_BYTES = 8  # of the data, as the safetensors library writes it
_LENGTH_BYTES = 8  # of the header's length, little-endian, https://github.com/huggingface/safetensors#format
_CHUNK_BYTES = 1 << 20  # read back at once; the second-level cache holds it
_WRITEBACK_BYTES = 1 << 18  # not for less: neighbours share a page, which would be written twice


@dataclass(frozen=True)
class SafetensorsHeader:
    """What lies where in a safetensors file.

    Attributes:
        content: the bytes before the data.
        specs: type and shape by name.
        begins: where in the file the data of each tensor begin, in bytes.
    """

    content: bytes
    specs: Mapping[str, TensorSpec]
    begins: Mapping[str, int]

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> SafetensorsHeader:
        """A new one. Data lie in the order given, wider types first so that each tensor is aligned."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        begins: dict[str, int] = {}
        end = 0
        for key, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            begins[key], end = end, end + spec.stored_bytes
            entries[key] = {"dtype": names[spec.dtype], "shape": spec.shape, "data_offsets": (begins[key], end)}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        content = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return cls(content, dict(specs), {key: len(content) + begin for key, begin in begins.items()})

    @classmethod
    def read(cls, path: Path) -> SafetensorsHeader:
        """That of a file which the safetensors library has found valid.

        Raises:
            CheckpointError: it can no longer be read.
        """
        try:
            with path.open("rb") as file:
                length = file.read(_LENGTH_BYTES)
                content = length + file.read(int.from_bytes(length, "little"))
            entries = json.loads(content[_LENGTH_BYTES:])
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error
        entries.pop("__metadata__", None)
        return cls(
            content,
            {key: TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"])) for key, entry in entries.items()},
            {key: len(content) + entry["data_offsets"][0] for key, entry in entries.items()},
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The strings under ``__metadata__``."""
        found: dict[str, str] = json.loads(self.content[_LENGTH_BYTES:]).get("__metadata__", {})
        return found

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.stored_bytes for spec in self.specs.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.content) + self.data_bytes


class SafetensorsStream:
    """A safetensors file with all of its space reserved, filled in any order, from any number of threads.

    As a context manager it closes the file on leaving; after an exception, or when the constructor fails, the
    unfinished file is left for the caller to delete. A copy out of a pickle goes on with the same file in another
    process.

    Args:
        path: the file to write; replaced if it exists.
        tensors: type and shape by name, in the order of ``SafetensorsHeader.of``; or a header, used as it is.
        metadata: strings for the header's ``__metadata__``, unless ``tensors`` is a header.
        counts: whether to check that each tensor is written once and none is forgotten. Off where several processes
            write, and for a stream that is reopened or came out of a pickle: there the caller keeps account.

    Raises:
        DiskError: the disk is full or cannot be written.
    """

    _pending: set[str] | None
    _fd: int | None
    _release: weakref.finalize[[int], SafetensorsStream] | None

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | SafetensorsHeader,
        *,
        metadata: Mapping[str, str] | None = None,
        counts: bool = True,
    ) -> None:
        self._attach(path, _header(tensors, metadata))
        self._pending = set(self.header.specs) if counts else None
        with self._disk_errors():
            fd = self._hold(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
            try:
                _reserve(fd, self.header.total_bytes, path)
                _write_all(fd, memoryview(self.header.content), 0)
            except BaseException:
                self.abandon()
                raise

    @classmethod
    def reopen(
        cls,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | SafetensorsHeader,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> SafetensorsStream:
        """The unfinished file that an earlier stream of the same tensors left, to go on with.

        Raises:
            OutputError: there is none, or its size or header differ.
            DiskError: it cannot be read.
        """
        stream = cls.__new__(cls)
        stream._attach(path, _header(tensors, metadata))
        stream._check_announced()
        return stream

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return self.header.total_bytes

    def write(self, name: str, tensor: Tensor) -> str:
        """Put one tensor in its place; the ``digest`` of what was written.

        Raises:
            ValueError: no such tensor, another type or shape than announced, or written before.
            DiskError: the disk is full or failed.
        """
        self._check_spec(name, tensor.dtype, tuple(tensor.shape))
        with self._lock:
            if self._pending is not None:
                if name not in self._pending:
                    raise ValueError(f"tensor '{name}' is written twice")
                self._pending.remove(name)
        data = bytes_of(tensor)
        self._write(name, 0, data)
        return xxhash.xxh3_128_hexdigest(data)

    def write_rows(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put some rows of a tensor in their place: (n, …), counted along its first dimension.

        Raises:
            ValueError: no such tensor, another type or shape than announced, or rows outside of it.
            DiskError: the disk is full or failed.
        """
        spec = self.header.specs.get(name, TensorSpec(rows.dtype, ()))
        self._check_spec(name, rows.dtype, (*spec.shape[:1], *rows.shape[1:]))
        row_count = spec.shape[0] if spec.shape else 0
        if not 0 <= first_row <= first_row + len(rows) <= row_count:
            raise ValueError(f"tensor '{name}' has {row_count} rows, given {len(rows)} from row {first_row} on")
        self.write_bytes(name, first_row * (spec.stored_bytes // max(1, row_count)), bytes_of(rows))

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Put bytes in their place, ``offset`` bytes from where the tensor begins.

        Raises:
            ValueError: no such tensor, or bytes outside of it.
            DiskError: the disk is full or failed.
        """
        spec = self.header.specs.get(name)
        if spec is None or not 0 <= offset <= offset + len(data) <= spec.stored_bytes:
            raise ValueError(f"tensor '{name}': announced as {spec}, given {len(data)} bytes from byte {offset} on")
        with self._lock:
            if self._pending is not None:
                self._pending.discard(name)
        self._write(name, offset, data)

    def digest(self, name: str) -> str:
        """The XXH3 hash, 128 bits in hexadecimal, of a tensor's bytes as they lie in the file.

        Raises:
            DiskError: the disk failed.
        """
        begin, left = self.header.begins[name], self.header.specs[name].stored_bytes
        hashed = xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(left, _CHUNK_BYTES)))
        with self._disk_errors():
            while left:
                count = os.preadv(self._descriptor(), [buffer[:left]], begin)
                if not count:
                    raise OSError(errno.EIO, "the file was truncated while it was written")
                hashed.update(buffer[:count])
                begin, left = begin + count, left - count
        return hashed.hexdigest()

    def flush(self) -> None:
        """Send what this process wrote to the disk, and close the file until it is used again.

        Raises:
            DiskError: the disk is full or failed.
        """
        if self._fd is not None:
            with self._disk_errors():
                os.fsync(self._fd)
            self.abandon()

    def finish(self) -> None:
        """Flush to the disk, whichever process wrote, and close.

        Raises:
            ValueError: a tensor was never written.
            DiskError: the disk failed.
        """
        try:
            if self._pending:
                raise ValueError(f"{len(self._pending)} tensors were never written, such as '{min(self._pending)}'")
            with self._disk_errors():
                os.fsync(self._descriptor())
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        with self._lock:
            if self._release is not None:
                self._release()
            self._fd = self._release = None

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def __getstate__(self) -> tuple[Path, SafetensorsHeader]:
        return self.path.absolute(), self.header

    def __setstate__(self, state: tuple[Path, SafetensorsHeader]) -> None:
        self._attach(*state)

    def _attach(self, path: Path, header: SafetensorsHeader) -> None:
        """To a file that need not exist yet; it is opened when it is first used."""
        self.path, self.header = path, header
        self._pending = None
        self._lock = threading.Lock()
        self._fd = self._release = None

    def _descriptor(self) -> int:
        """The open file; opened where this process has not yet."""
        with self._lock:
            return self._hold(os.open(self.path, os.O_RDWR)) if self._fd is None else self._fd

    def _hold(self, fd: int) -> int:
        """Keep the descriptor until ``abandon``, or until nobody holds the stream."""
        self._fd, self._release = fd, weakref.finalize(self, os.close, fd)
        return fd

    def _write(self, name: str, offset: int, data: memoryview) -> None:
        begin = self.header.begins[name] + offset
        with self._disk_errors():
            _write_all(self._descriptor(), data, begin)
        if len(data) >= _WRITEBACK_BYTES:
            _start_writeback(self._descriptor(), begin, len(data))

    def _check_spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        spec, found = self.header.specs.get(name), TensorSpec(dtype, shape)
        if spec != found:
            raise ValueError(f"tensor '{name}': announced as {spec}, given {found}")

    def _check_announced(self) -> None:
        if not self.path.is_file():
            raise OutputError(f"{self.path}: there is no unfinished file to go on with. Start over.")
        with self._disk_errors():
            size_bytes = self.path.stat().st_size
            content = os.pread(self._descriptor(), len(self.header.content), 0)
        if size_bytes != self.total_bytes or content != self.header.content:
            self.abandon()
            header = "the same" if content == self.header.content else "another"
            raise OutputError(
                f"{self.path}: holds {size_bytes:,} bytes under {header} header; expected the {self.total_bytes:,} "
                "that were announced. It was never complete, or belongs to another merge: delete it and start over."
            )

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self.path, needed_bytes=self.total_bytes)


@contextmanager
def disk_errors(path: Path, *, needed_bytes: int) -> Iterator[None]:
    """What the operating system reports, as a ``DiskError``."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, needed_bytes=needed_bytes) from error


def disk_error(path: Path, error: OSError, *, needed_bytes: int) -> DiskError:
    """What the operating system reports; of a full disk, with how much room is needed."""
    if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
        return DiskError(f"{path}: cannot be written: {error.strerror or error}.")
    free_bytes = shutil.disk_usage(path.parent).free
    return DiskError(
        f"{path}: the disk is full: {needed_bytes:,} bytes are needed, {free_bytes:,} are free. "
        "Free some space or choose another output directory."
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they are stored."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | SafetensorsHeader, metadata: Mapping[str, str] | None
) -> SafetensorsHeader:
    if isinstance(tensors, SafetensorsHeader):
        return tensors
    specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    return SafetensorsHeader.of(specs, metadata or {})


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


def _start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Let the disk work while the next tensors are computed, and little be left to wait for in the end.

    So Linux takes this advice for pages that are not yet on the disk; those that are may go from memory.
    """
    with suppress(AttributeError, OSError):  # advice that is not understood changes nothing
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)
