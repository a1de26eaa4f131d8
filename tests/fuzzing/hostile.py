"""Pickles that want to run code, to take memory without end, or to be something other than tensors."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from tests.fuzzing.contents import Pickled, encoded

__all__ = ["hostile_pickle"]

COMMAND = "touch fuzzing-ran-code"


class Call:
    """What calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._made = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made


def hostile_pickle(content: Pickled, chance: Random) -> bytes:
    """A PyTorch pickle, a plain one or an archive, with something hostile among its tensors or in their place."""
    thing = chance.choice(_THINGS)()
    tensors: Any = {**content.tensors, chance.choice(["x", *content.tensors]): thing}
    if chance.random() < 0.2:
        tensors = thing
    match chance.randrange(4):
        case 0 if not isinstance(thing, torch.Tensor):
            return pickle.dumps(thing, protocol=chance.choice([0, 2, 4]))
        case 1:
            return _bomb(encoded(content), chance)
        case _:
            return _saved(tensors, content.is_zipped)


def _saved(value: Any, is_zipped: bool) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, file, _use_new_zipfile_serialization=is_zipped)
    return file.getvalue()


def _bomb(content: bytes, chance: Random) -> bytes:
    """The archive with a record that unpacks to much more, or with records named by the way out of it."""
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        return content
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(list(records))
    data = records.pop(name)
    changes = ({name: b"\0" * (1 << 23)}, {f"../../{name}": data}, {name: pickle.dumps(Call(os.system, COMMAND))}, {})
    records |= chance.choice(changes)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", chance.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])) as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    return made.getvalue()


def _laughs() -> list[Any]:
    """A list of two of a list of two, forty deep: little in memory, without end when it is shown."""
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    return value


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100):
        value = [value]
    return value


def _endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


_THINGS: tuple[Callable[[], Any], ...] = (
    lambda: Call(os.system, COMMAND),
    lambda: Call(eval, "__import__('os').system('touch fuzzing-ran-code')"),
    lambda: Call(exec, "import antigravity"),
    lambda: Call(open, "/etc/passwd"),
    lambda: Call(subprocess.Popen, ["touch", "fuzzing-ran-code"]),
    lambda: Call(__import__, "antigravity"),
    lambda: Call(bytearray, 1 << 42),
    lambda: Call(bytes, 1 << 42),
    lambda: Call(torch.empty, (1 << 42,)),
    lambda: Call(torch.load, "/etc/passwd"),
    lambda: Call(torch.Tensor, 1 << 42),
    lambda: Call(OrderedDict, [("a", Call(os.system, COMMAND))]),
    lambda: [Call(os.system, COMMAND)],
    lambda: {"nested": {"deeper": Call(eval, "1")}},
    lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
    lambda: torch.zeros(4).as_strided((1 << 15, 1 << 15), (0, 0)),
    lambda: torch.zeros(0).expand(1 << 40, 0),
    lambda: torch.zeros(3, 4, device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    lambda: torch.nn.Parameter(torch.ones(2, 2)),
    lambda: torch.ones(2, 2, dtype=torch.complex64),
    lambda: {1: torch.ones(1)},
    lambda: {("a", 1): torch.ones(1)},
    lambda: torch.nn.Linear(2, 2),
    lambda: {"x": 1 << 4096},
    lambda: object,
    lambda: None,
    lambda: "text",
    lambda: b"\0" * 100_000,
    _laughs,
    _deep,
    _endless,
)
