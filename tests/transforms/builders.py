"""A dialect of the tests' own, with writers that get one thing wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lowrank import Checkpoint, Format, ModuleHeader, Registry, hookimpl
from mergekit_lowrank.formats import Writer
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.testing import write_tiny_adapter

MODULES = {"layers.0.q_proj": (6, 5), "layers.1.q_proj": (6, 5), "layers.0.v_proj": (4, 5)}


def write_adapter(path: Path, **changes: Any) -> Path:
    return write_tiny_adapter(path, MODULES, **changes)


class FlatCheckpoint(Checkpoint):
    """The file of ``FlatWriter``: modules without dots."""

    def __init__(self, path: Path, label: str) -> None:
        self.label, self.location, self.files = label, str(path), (path,)
        self.base_model, self.config = None, {}
        self._tensors = load_file(path)
        names = [key.removesuffix(".down") for key in self._tensors if key.endswith(".down")]
        self.modules = {name: self._header(name) for name in names}

    def _header(self, name: str) -> ModuleHeader:
        down, up = self._tensors[f"{name}.down"], self._tensors[f"{name}.up"]
        scaling = float(self._tensors[f"{name}.alpha"]) / len(down)
        return ModuleHeader(name, len(up), down.shape[1], len(down), scaling, down.dtype, down.nbytes + up.nbytes)

    def read(self, module: str) -> LowRankUpdate:
        scaling = self.modules[module].scaling
        return LowRankUpdate(self._tensors[f"{module}.up"], self._tensors[f"{module}.down"], scaling)


class FlatFormat(Format):
    name = "flat"
    summary = "the tests' own"

    def recognises(self, path: Path) -> bool:
        return path.name == "flat.safetensors" or (path / "flat.safetensors").is_file()

    def open(self, path: Path, *, label: str) -> Checkpoint:
        return FlatCheckpoint(path / "flat.safetensors" if path.is_dir() else path, label)


class FlatWriter(Writer):
    name = "flat"
    summary = "the tests' own"

    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for module, header in checkpoint.modules.items():
            update = checkpoint.read(module)
            assert isinstance(update, LowRankUpdate)
            flat = module.replace(".", "_")
            alpha = torch.tensor(header.scaling * header.rank)
            tensors |= {f"{flat}.down": update.a, f"{flat}.up": update.b, f"{flat}.alpha": alpha}
        save_file(self.spoilt({name: tensor.contiguous() for name, tensor in tensors.items()}), self.file(directory))

    def spoilt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def file(self, directory: Path) -> Path:
        return directory / "flat.safetensors"


class ForgetfulWriter(FlatWriter):
    name = "forgetful"

    def spoilt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "layers_0_v_proj" not in name}


class InventiveWriter(FlatWriter):
    name = "inventive"

    def spoilt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        added = {f"head.{part}": tensors[f"layers_0_q_proj.{part}"] + 1 for part in ("down", "up", "alpha")}
        return {**tensors, **added}


class LoudWriter(FlatWriter):
    name = "loud"

    def spoilt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "layers_1_q_proj.alpha": tensors["layers_1_q_proj.alpha"] * 2}


class RoundingWriter(FlatWriter):
    name = "rounding"

    def spoilt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "layers_0_q_proj.up": tensors["layers_0_q_proj.up"].bfloat16().float()}


class UnreadWriter(FlatWriter):
    name = "unread"

    def file(self, directory: Path) -> Path:
        return directory / "unread.safetensors"


class BasedWriter(FlatWriter):
    name = "based"

    def __init__(self, base_config: Any = None) -> None:
        assert base_config == {"model_type": "tiny"}


WRITERS = (
    FlatWriter,
    ForgetfulWriter,
    InventiveWriter,
    LoudWriter,
    RoundingWriter,
    UnreadWriter,
    BasedWriter,
)


class Plugin:
    @hookimpl
    def formats(self) -> list[type[Format]]:
        return [FlatFormat]

    @hookimpl
    def writers(self) -> list[type[Writer]]:
        return [*WRITERS]


def registry() -> Registry:
    """The built-ins, and the tests' dialect."""
    made = Registry()
    made.register(Plugin(), "flat")
    return made
