"""Tensor files, headers first: safetensors, pickles, shards and plain mappings behind one class.

Opening reads headers only. ``read`` then copies one tensor, or ``read_rows`` some of its rows, out of a safetensors
file, so that nothing stays mapped and memory is bounded by what the caller holds; tensors of a pickle are views of the
mapped file. Sources can be pickled: another process opens their files anew.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.filenames import OUTLINE_MARK

__all__ = [
    "DTYPES",
    "SafetensorsFile",
    "ShardedTensors",
    "TensorMapping",
    "TensorSource",
    "TensorSpec",
    "open_tensors",
]

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""The types this package stores and reads, by their names in safetensors headers."""

_SHOWN_CHARACTERS = 300  # of a message about a corrupt file, which may quote all of it
_HEADER_LENGTH_BYTES = 8  # little-endian, https://github.com/huggingface/safetensors#format


class _HeaderEntry(TypedDict):
    """One tensor in a safetensors header that the library has found valid."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorSource(ABC):
    """Named tensors of which only the headers are known until one is read. Safe to read from several threads.

    Attributes:
        files: the files it consists of; empty for tensors in memory.
        specs: type and shape by name, in the order in which the data lie.
        is_outline: whether some of the data were left on the Hugging Face Hub, for a plan; to read them is an error.
    """

    files: tuple[Path, ...]
    specs: Mapping[str, TensorSpec]
    is_outline: bool = False

    @property
    def identity(self) -> object:
        """Equal for two sources that are one."""
        return self.files

    @property
    def shards(self) -> Mapping[Path, tuple[str, ...]]:
        """The names by the file that holds their data, in the order of ``specs``; empty for tensors in memory."""
        return {file: tuple(self.specs) for file in self.files}

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU in its stored type. Not to be written to.

        Raises:
            CheckpointError: the file can no longer be read.
        """

    def read_rows(self, key: str, where: slice) -> Tensor:
        """Rows ``where`` of one tensor, along its first dimension, as ``read`` gives them.

        Args:
            key: a tensor of at least one dimension.
            where: without a step.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        return self.read(key)[where]


def open_tensors(path: Path) -> TensorSource:
    """The tensors of a ``.safetensors`` file, a pickle, or the shards that an ``.index.json`` lists.

    Raises:
        CheckpointError: a file is missing, corrupt, or holds something other than tensors.
    """
    if path.name.endswith(".index.json"):
        return ShardedTensors(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return TensorMapping(_load_pickle(path), where=str(path), files=(path,))


class SafetensorsFile(TensorSource):
    """One safetensors file: checked by the safetensors library, read one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        header, data_start, self.is_outline = _read_safetensors_header(path)
        ordered = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        self.specs = {key: _spec(entry, key=key, path=path) for key, entry in ordered}
        self._positions = {key: data_start + entry["data_offsets"][0] for key, entry in ordered}

    def read(self, key: str) -> Tensor:
        """A copy of one tensor."""
        spec = self.specs[key]
        return self._read_bytes(key, 0, spec.stored_bytes).view(spec.dtype).reshape(spec.shape)

    def read_rows(self, key: str, where: slice) -> Tensor:
        """A copy of some rows, which lie in one piece."""
        spec = self.specs[key]
        first, end, _ = where.indices(spec.shape[0])
        rows, row_bytes = max(0, end - first), spec.stored_bytes // max(1, spec.shape[0])
        data = self._read_bytes(key, first * row_bytes, rows * row_bytes)
        return data.view(spec.dtype).reshape(rows, *spec.shape[1:])

    def _read_bytes(self, key: str, begin: int, size_bytes: int) -> Tensor:
        """Bytes of one tensor, from its ``begin``-th on. Each call opens the file anew: threads share no position."""
        (path,), spec = self.files, self.specs[key]
        if self.is_outline:
            raise CheckpointError(f"{path}: tensor '{key}' was not fetched: only the header was, for a plan.")
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(self._positions[key] + begin)
                count = file.readinto(buffer.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read tensor '{key}': {error}.") from error
        if count != size_bytes:
            raise CheckpointError(
                f"{path}: tensor '{key}' ends after {begin + count} of {spec.stored_bytes} bytes. The file changed "
                "while it was in use: copy or download it again, and start over."
            )
        return buffer


class TensorMapping(TensorSource):
    """Tensors that are already at hand: given in memory, or mapped from a pickle.

    Args:
        tensors: by name; not copied.
        where: what messages call it.
        files: the files behind the mapping, if any.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, where: str, files: tuple[Path, ...] = ()) -> None:
        for key, value in tensors.items():
            _check_dense(key, value, where)
            if files:
                _check_stored(key, value, where)
        self.files = files
        self.specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        self._tensors = dict(tensors)

    @property
    def identity(self) -> object:
        """Where the tensors lie in memory."""
        return tuple(sorted((key, tensor.data_ptr()) for key, tensor in self._tensors.items()))

    def read(self, key: str) -> Tensor:
        """The tensor itself where it is on the CPU, else a copy."""
        return self._tensors[key].detach().cpu()

    def read_rows(self, key: str, where: slice) -> Tensor:
        """The rows themselves where they are on the CPU, else a copy."""
        return self._tensors[key].detach()[where].cpu()

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """The path of a pickle, which is mapped again; tensors in memory themselves."""
        return (open_tensors, self.files) if self.files else (_from_memory, (self._tensors,))


class ShardedTensors(TensorSource):
    """The shards that an ``.index.json`` with a ``weight_map`` lists, shard after shard."""

    def __init__(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
        shards = {name: _open_shard(index, name) for name in sorted(set(weight_map.values()))}
        for key, name in weight_map.items():
            if key not in shards[name].specs:
                raise CheckpointError(
                    f"{index}: tensor '{key}' should be in '{name}', which does not hold it. "
                    "Index and shards must come from the same save: download all of it again."
                )
        for name, shard in shards.items():
            for key in shard.specs:
                if weight_map.get(key) != name:
                    raise CheckpointError(
                        f"{index}: '{name}' holds tensor '{key}', which the index does not place there. "
                        "Index and shards must come from the same save: download all of it again."
                    )
        self.files = (index, *(file for shard in shards.values() for file in shard.files))
        self.specs = {key: spec for shard in shards.values() for key, spec in shard.specs.items()}
        self._shards = {key: shards[name] for key, name in weight_map.items()}
        self._files = {file: keys for shard in shards.values() for file, keys in shard.shards.items()}
        self.is_outline = any(shard.is_outline for shard in shards.values())

    @property
    def shards(self) -> Mapping[Path, tuple[str, ...]]:
        """The names by shard, shard after shard."""
        return self._files

    def read(self, key: str) -> Tensor:
        """One tensor out of its shard."""
        return self._shards[key].read(key)

    def read_rows(self, key: str, where: slice) -> Tensor:
        """Some rows out of their shard."""
        return self._shards[key].read_rows(key, where)


def _from_memory(tensors: Mapping[str, Tensor]) -> TensorMapping:
    return TensorMapping(tensors, where="in memory")


def _read_safetensors_header(path: Path) -> tuple[dict[str, _HeaderEntry], int, bool]:
    """The entries of a header that the library has found valid, where the data start, and whether there are none."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({error}). {_advice_on_corrupt_file(path)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    metadata = header.pop("__metadata__", None) or {}
    return header, _HEADER_LENGTH_BYTES + length, OUTLINE_MARK in metadata


def _spec(entry: _HeaderEntry, *, key: str, path: Path) -> TensorSpec:
    name = entry["dtype"]
    if name not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor '{key}' has type {name}; the types that can be read are {', '.join(DTYPES)}. "
            "Save it in float32, float16 or bfloat16."
        )
    return TensorSpec(DTYPES[name], tuple(entry["shape"]))


def _advice_on_corrupt_file(path: Path) -> str:
    """What to do about a file that is not safetensors, judged by how it begins."""
    with path.open("rb") as file:
        start = file.read(16)
    size_bytes = path.stat().st_size
    if start.startswith(b"version https://"):
        return "It is a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository."
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "It looks like a PyTorch pickle: give its name the ending '.bin', or convert it to safetensors."
    return (
        f"Found {size_bytes} bytes; expected an 8-byte header length, a JSON header, and data that its "
        "offsets cover exactly. The file is probably truncated: copy or download it again."
    )


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The mapping in a PyTorch pickle, mapped from the file where its layout allows; code in it is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol: what matters of it becomes an error below
            # Only zip archives, PyTorch's layout since 1.6, can be mapped; older files are read whole.
            is_archive = zipfile.is_zipfile(path)
            if is_archive:
                _check_not_packed(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_refused(str(error))}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    except Exception as error:  # unpickling a corrupt file can raise anything
        reason = str(error)[:_SHOWN_CHARACTERS].split(". ")[0] or "unexpected end of file"
        raise CheckpointError(
            f"{path}: not a valid PyTorch file ({type(error).__name__}: {reason}). Copy or download it again."
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a dictionary of tensors by name.")
    return loaded


def _check_not_packed(path: Path) -> None:
    """Refuse an archive that grows when it is unpacked; PyTorch stores records as they are."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"the record '{packed[0]}' is compressed, and PyTorch never does that")


def _why_refused(message: str) -> str:
    """What an ``UnpicklingError`` of ``torch.load(weights_only=True)`` means."""
    culprit = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", message)
    if culprit is None:
        return (
            "not a plain PyTorch file: its pickle is corrupt or holds more than tensors. Nothing in it was run. "
            "Copy or download it again, or convert it to safetensors where it comes from."
        )
    return (
        f"this pickle wants to run code ('{culprit[1]}') when it is loaded, and was refused. "
        "Convert it to safetensors where it comes from; load it by other means only if you trust its author."
    )


def _check_dense(key: object, value: object, where: str) -> None:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{where}: entry {key!r} is a {type(value).__name__}; expected tensors by name only. Save the state "
            "dict alone, as save_pretrained does."
        )
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise CheckpointError(
            f"{where}: tensor '{key}' is sparse, quantised or without data; expected a dense tensor. Save it with "
            ".to_dense() or .dequantize()."
        )


def _check_stored(key: str, value: Tensor, where: str) -> None:
    """Refuse a tensor that repeats what it stores: a few bytes of a file may show any number of values like that."""
    stored_bytes = value.untyped_storage().nbytes()
    if value.nbytes > stored_bytes:
        raise CheckpointError(
            f"{where}: tensor '{key}' {list(value.shape)} repeats the {stored_bytes} bytes that it stores; expected a "
            "tensor that is stored whole. Save it with .contiguous()."
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON: {error}. Download it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to file names. Download it again.")
    return weight_map


def _open_shard(index: Path, name: str) -> TensorSource:
    if PurePosixPath(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{index}: shard '{name}' lies outside the directory of the index, and was refused. "
            "Shards are named by a plain file name; do not use this checkpoint unless you know why it differs."
        )
    if not name.endswith((".safetensors", ".bin")):
        raise CheckpointError(f"{index}: shard '{name}' is neither a .safetensors nor a .bin file.")
    path = index.with_name(name)
    if not path.is_file():
        raise CheckpointError(f"{index}: shard '{name}' is missing. Download all of it again.")
    return open_tensors(path)
