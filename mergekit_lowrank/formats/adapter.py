"""An adapter in memory: what a program passes in and gets back instead of a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.base import Checkpoint
from mergekit_lowrank.formats.directory import new_directory, write_text
from mergekit_lowrank.formats.peft import open_peft
from mergekit_lowrank.formats.peft_config import CONFIG_NAME
from mergekit_lowrank.formats.stream import SafetensorsStream
from mergekit_lowrank.formats.tensors import TensorMapping

__all__ = ["Adapter", "ConfigLike"]


class ConfigLike(Protocol):
    """What has a ``to_dict``, as ``peft.LoraConfig`` does."""

    def to_dict(self) -> Mapping[str, object]:
        """The configuration as a mapping."""
        ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory, in PEFT's names.

    Attributes:
        state_dict: as ``peft.get_peft_model_state_dict`` gives it.
        config: a ``peft.LoraConfig``, or the mapping that ``adapter_config.json`` would hold.
    """

    state_dict: Mapping[str, Tensor]
    config: Mapping[str, object] | ConfigLike

    def open(self, *, label: str) -> Checkpoint:
        """The adapter as an input, with the same checks as one on disk.

        Raises:
            CheckpointError: what a directory with this content would raise.
        """
        where = f"adapter '{label}'"
        source = TensorMapping(self.state_dict, where=where)
        return open_peft(
            self._config_mapping(where), source, label=label, location="in memory", where=f"{where}: config"
        )

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """The directory, written whole: ``adapter_model.safetensors`` and ``adapter_config.json``.

        Raises:
            OutputError: ``path`` exists and is not to be overwritten, or cannot be written.
            CheckpointError: the configuration or the state dict cannot be stored.
        """
        target = Path(path)
        with new_directory(target, overwrite=overwrite) as partial:
            self.fill(partial)
        return target

    def fill(self, directory: Path) -> None:
        """Write the files of the adapter into a directory."""
        where = f"adapter for {directory.name}"
        config = json.dumps(self._config_mapping(where), indent=2)  # not sorted: the first pattern that matches wins
        specs = TensorMapping(self.state_dict, where=where).specs
        announced = {key: (spec.dtype, spec.shape) for key, spec in specs.items()}
        with SafetensorsStream(directory / "adapter_model.safetensors", announced, metadata={"format": "pt"}) as stream:
            for key, tensor in self.state_dict.items():
                stream.write(key, tensor)
        write_text(directory / CONFIG_NAME, config)

    def _config_mapping(self, where: str) -> dict[str, object]:
        raw = self.config if isinstance(self.config, Mapping) else self.config.to_dict()
        return {str(name): _jsonable(value, f"{where}: config field '{name}'") for name, value in raw.items()}


def _jsonable(value: object, where: str) -> object:
    """The value as JSON would hold it: enumerations by value, sets as sorted lists."""
    if isinstance(value, Enum):
        return _jsonable(value.value, where)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item, where) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [_jsonable(item, where) for item in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_jsonable(item, where) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold. Pass plain values.")
