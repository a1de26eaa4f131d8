"""Writing the weights of a whole model: the base's files, some of their tensors replaced and all others copied."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError, DiskError, OutputError
from mergekit_lowrank.formats.stream import SafetensorsHeader, SafetensorsStream, bytes_of, disk_error, disk_errors
from mergekit_lowrank.formats.tensors import TensorSource, TensorSpec

__all__ = ["ModelLayout", "ModelWriter"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5 and before
_METADATA = {"format": "pt"}  # transformers asks for it
_CHUNK_BYTES = 1 << 20  # copied at once; the second-level cache holds it


@dataclass(frozen=True)
class ModelLayout:
    """Which tensors lie where in the files of a model.

    Attributes:
        files: the header of each file by its name, in order.
        out_dtype: what floating tensors become; None where each keeps its type.
    """

    files: Mapping[str, SafetensorsHeader]
    out_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        source: TensorSource,
        shards: Mapping[Path, Sequence[str]],
        *,
        out_dtype: torch.dtype | None = None,
        shard_bytes: int | None = None,
    ) -> ModelLayout:
        """That of a base model: its own files, headers to the byte where no type changes; pickles as safetensors.

        Args:
            source: the tensors of the base.
            shards: the tensors to write by the file that holds them, in order; empty where they are in memory only.
            out_dtype: the type of all floating tensors.
            shard_bytes: tensor data of one file; a tensor above that gets a file of its own. Tensors keep their order
                but are divided anew.

        Raises:
            CheckpointError: a file can no longer be read.
        """
        keys = [key for shard in shards.values() for key in shard] if shards else list(source.specs)
        specs = {key: _stored(source.specs[key], out_dtype) for key in keys}
        if shard_bytes is not None or not shards:
            headers = [SafetensorsHeader.of(part, _METADATA) for part in _divided(specs, shard_bytes)]
            return cls(dict(zip(_shard_names(len(headers)), headers, strict=True)), out_dtype)
        files = {_file_name(path): _header(path, {key: specs[key] for key in shard}) for path, shard in shards.items()}
        return cls(files, out_dtype)

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        """The file of each tensor."""
        return {key: name for name, header in self.files.items() for key in header.specs}

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.data_bytes for header in self.files.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(header.total_bytes for header in self.files.values())

    @property
    def index(self) -> dict[str, object] | None:
        """The content of the index file; None where transformers finds the only file by its name."""
        if list(self.files) == [_WEIGHTS]:
            return None
        return {"metadata": {"total_size": self.data_bytes}, "weight_map": dict(self.weight_map)}

    def spec(self, key: str) -> TensorSpec:
        """Type and shape of one tensor as it is written."""
        return self.files[self.weight_map[key]].specs[key]


class ModelWriter:
    """The files of a model, all of their space reserved, filled in any order from any number of threads.

    A copy out of a pickle goes on with the same files in another process. Which tensors are complete is known to the
    caller.

    Args:
        directory: where the files lie.
        layout: what is to lie in them.
        source: the tensors of the base.
        resumes: whether to go on with the unfinished files that are there; else they are replaced.
        creates: whether files that are missing or damaged are made anew.

    Raises:
        DiskError: the disk is full, or cannot be written; new files are deleted again.
    """

    def __init__(
        self, directory: Path, layout: ModelLayout, source: TensorSource, *, resumes: bool = False, creates: bool = True
    ) -> None:
        self.directory, self.layout = directory, layout
        self._source = source
        self._streams = _open_all(directory, layout, resumes=resumes, creates=creates)

    def write_rows(self, key: str, first_row: int, rows: Tensor) -> None:
        """Put some rows of a parameter in their place.

        Args:
            key: its tensor.
            first_row: of the parameter as a matrix: (1, d) of a vector, (d_0, rest) of what has more dimensions.
            rows: (n, d) in the layout's type.

        Raises:
            ValueError: another type or width than the layout's, or rows outside of the parameter.
            DiskError: the disk is full or failed.
        """
        spec = self.layout.spec(key)
        columns = math.prod(spec.shape[1:] if len(spec.shape) > 1 else spec.shape)
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != (columns,):
            found = TensorSpec(rows.dtype, tuple(rows.shape))
            raise ValueError(f"tensor '{key}': announced as {spec}, {columns} columns; given {found}")
        self._stream(key).write_bytes(key, first_row * columns * spec.dtype.itemsize, bytes_of(rows))

    def stored(self, key: str, block: Tensor) -> Tensor:
        """A block of a parameter in the layout's type.

        Raises:
            OutputError: the type cannot hold a value.
        """
        return _cast(key, block, self.layout.spec(key).dtype)

    def copy(self, key: str) -> str:
        """Put the base's tensor in its place, cast where the layout's type differs; the digest of what was written.

        Holds 1 MiB of it at once, or one row where that is more.

        Raises:
            CheckpointError: the base can no longer be read.
            OutputError: the new type cannot hold a value.
            DiskError: the disk is full or failed.
        """
        stream, dtype = self._stream(key), self.layout.spec(key).dtype
        hashed = xxhash.xxh3_128()
        offset = 0
        for block in self._blocks(key):
            data = bytes_of(_cast(key, block, dtype))
            stream.write_bytes(key, offset, data)
            hashed.update(data)
            offset += len(data)
        return hashed.hexdigest()

    def digest(self, key: str) -> str:
        """The XXH3 hash, 128 bits in hexadecimal, of a tensor's bytes as they lie in the file.

        Raises:
            DiskError: the disk failed.
        """
        return self._stream(key).digest(key)

    def flush(self) -> None:
        """Send what this process wrote to the disk, and close all files until they are used again.

        Raises:
            DiskError: the disk is full or failed.
        """
        for stream in self._streams.values():
            stream.flush()

    def finish(self, companions: Mapping[str, Path] | None = None) -> None:
        """Flush all tensors to the disk, whichever process wrote them; write the index, and copy what lies beside.

        Args:
            companions: files of the base such as its configuration and tokenizer, by their path in ``directory``. The
                configuration gets the new type.

        Raises:
            CheckpointError: a companion can no longer be read.
            DiskError: the disk is full or failed.
        """
        for stream in self._streams.values():
            stream.finish()
        if self.layout.index is not None:
            _write_json(self.directory / _INDEX, self.layout.index, sort_keys=True)
        for name, path in (companions or {}).items():
            self._copy_companion(name, path)

    def abandon(self) -> None:
        """Close all files as they are."""
        for stream in self._streams.values():
            stream.abandon()

    def _stream(self, key: str) -> SafetensorsStream:
        return self._streams[self.layout.weight_map[key]]

    def _blocks(self, key: str) -> Iterator[Tensor]:
        spec = self._source.specs[key]
        if not spec.shape:
            yield self._source.read(key)
            return
        rows = max(1, _CHUNK_BYTES * spec.shape[0] // max(1, spec.stored_bytes))
        for first in range(0, spec.shape[0], rows):
            yield self._source.read_rows(key, slice(first, min(first + rows, spec.shape[0])))

    def _copy_companion(self, name: str, path: Path) -> None:
        target, dtype = self.directory / name, self.layout.out_dtype
        try:
            size_bytes = path.stat().st_size
            config = json.loads(path.read_bytes()) if dtype is not None and name == _CONFIG else None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error
        if (changed := _with_dtype(config, str(dtype).removeprefix("torch."))) != config:
            _write_json(target, changed)
            return
        with disk_errors(target, needed_bytes=size_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _stored(spec: TensorSpec, out_dtype: torch.dtype | None) -> TensorSpec:
    return TensorSpec(out_dtype, spec.shape) if out_dtype and spec.dtype.is_floating_point else spec


def _divided(specs: Mapping[str, TensorSpec], shard_bytes: int | None) -> Iterator[dict[str, TensorSpec]]:
    """The tensors of each file, in order; at least one of each, and as many as fit."""
    part: dict[str, TensorSpec] = {}
    part_bytes = 0
    for key, spec in specs.items():
        if part and shard_bytes is not None and part_bytes + spec.stored_bytes > shard_bytes:
            yield part
            part, part_bytes = {}, 0
        part[key] = spec
        part_bytes += spec.stored_bytes
    yield part


def _shard_names(count: int) -> list[str]:
    """What transformers calls them."""
    if count == 1:
        return [_WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _file_name(path: Path) -> str:
    """A shard's own name; of a pickle, what transformers would call it as safetensors."""
    if path.suffix == ".safetensors":
        return path.name
    return path.with_suffix(".safetensors").name.removeprefix("pytorch_")


def _header(path: Path, specs: Mapping[str, TensorSpec]) -> SafetensorsHeader:
    """The base's own where it says the same, so that an untouched file has the same bytes."""
    if path.suffix != ".safetensors":
        return SafetensorsHeader.of(specs, _METADATA)
    found = SafetensorsHeader.read(path)
    return found if found.specs == specs else SafetensorsHeader.of(specs, _METADATA | found.metadata)


def _open_all(directory: Path, layout: ModelLayout, *, resumes: bool, creates: bool) -> dict[str, SafetensorsStream]:
    """A stream for each file; none that is new is left where one cannot be made."""
    streams: dict[str, SafetensorsStream] = {}
    made: list[Path] = []
    try:
        for name, header in layout.files.items():
            stream = _reopened(directory / name, header) if resumes else None
            if stream is None and not creates:
                raise OutputError(f"{directory / name}: is missing, or not of the size and header that were announced.")
            if stream is None:
                made.append(directory / name)
                stream = SafetensorsStream(directory / name, header, counts=False)
            streams[name] = stream
    except DiskError as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error.__cause__, OSError):
            raise disk_error(directory, error.__cause__, needed_bytes=layout.total_bytes) from error.__cause__
        raise
    return streams


def _reopened(path: Path, header: SafetensorsHeader) -> SafetensorsStream | None:
    """The unfinished file; None where the process was killed while it made the file, so that nothing in it counts."""
    try:
        return SafetensorsStream.reopen(path, header)
    except DiskError:
        raise
    except OutputError:
        return None


def _cast(key: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """The block in the stored type, rounded once; what was infinite or NaN before may stay so."""
    if block.dtype == dtype:
        return block
    # PyTorch knows few operations on types narrower than float32, and casts slowly between them.
    wide = block.float() if block.dtype.itemsize < torch.float32.itemsize else block
    if not _fits(wide, torch.finfo(dtype).max):
        name = str(dtype).removeprefix("torch.")
        raise OutputError(
            f"tensor '{key}': its values exceed the range of {name}; set out_dtype: bfloat16 or float32, or none"
        )
    return wide.to(dtype)


def _fits(block: Tensor, limit: float) -> bool:
    """Whether all finite entries are within ± ``limit``. Almost always one sum of squares says so, the fastest pass."""
    entries = block.reshape(-1)
    if block.numel() == 0 or float(torch.dot(entries, entries)) <= limit * limit:
        return True
    low, high = (bound.item() for bound in torch.aminmax(block))  # NaN propagates; no mask is made
    return -limit <= low <= high <= limit or not bool((block[block.isfinite()].abs() > limit).any())


def _with_dtype(config: Any, name: str) -> Any:
    """A configuration whose own type, and those of its parts, are ``name`` wherever it states one."""
    if not isinstance(config, dict):
        return config
    return {
        key: name if key in _DTYPE_KEYS and isinstance(value, str) else _with_dtype(value, name)
        for key, value in config.items()
    }


def _write_json(path: Path, content: object, *, sort_keys: bool = False) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    with disk_errors(path, needed_bytes=len(text)):
        path.write_text(text, encoding="utf-8")
