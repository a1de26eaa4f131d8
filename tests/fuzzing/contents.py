"""What the files of a sample hold before they are bytes, so that it can be mutated by its structure."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mergekit_lowrank.formats import DTYPES

__all__ = ["Content", "Json", "Pickled", "Sample", "Tensors", "encoded", "header_and_data", "safetensors_bytes"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.complex64: "C64"}


@dataclass(frozen=True)
class Json:
    """A JSON document."""

    value: Any


@dataclass(frozen=True)
class Tensors:
    """A safetensors file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pickled:
    """A PyTorch pickle.

    Attributes:
        tensors: what is pickled.
        is_zipped: whether in the layout of PyTorch 1.6 and later.
    """

    tensors: Mapping[Any, Any]
    is_zipped: bool = True


Content: TypeAlias = Json | Tensors | Pickled | bytes
Sample: TypeAlias = Mapping[str, Content]
"""The files of one valid input, by name."""


@singledispatch
def encoded(content: Any) -> bytes:
    """The bytes of a file."""
    raise TypeError(type(content))


@encoded.register
def _(content: bytes) -> bytes:
    return content


@encoded.register
def _(content: Json) -> bytes:
    return json.dumps(content.value).encode()


@encoded.register
def _(content: Tensors) -> bytes:
    return safetensors_bytes(*header_and_data(content))


@encoded.register
def _(content: Pickled) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(dict(content.tensors), file, _use_new_zipfile_serialization=content.is_zipped)
    return file.getvalue()


def header_and_data(content: Tensors) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it. The library would refuse to write damaged ones."""
    header: dict[str, Any] = {"__metadata__": dict(content.metadata)} if content.metadata else {}
    data = b""
    for name, tensor in content.tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return header, data


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """The file of a header, which may be text already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
