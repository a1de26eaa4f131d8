"""PEFT LoRA adapters: a directory with ``adapter_config.json`` and ``adapter_model.*``, or the same in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.base import Checkpoint, Format, ModuleHeader
from mergekit_lowrank.formats.peft_config import CONFIG_NAME, PeftConfig, read_config
from mergekit_lowrank.formats.peft_keys import FactorPair, Findings, pair_factors, tensor_names
from mergekit_lowrank.formats.tensors import TensorSource, open_tensors
from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["PeftCheckpoint", "PeftFormat"]

# In the order in which peft prefers them.
_TENSOR_FILES = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)

# LLaVA keeps a projector beside the adapter, as whole tensors.
_SIDE_FILE = "non_lora_trainables.bin"


class PeftCheckpoint(Checkpoint):
    """A LoRA adapter in PEFT's layout, on disk or in memory.

    Args:
        source: its tensors.
        config: its configuration.
        label: what messages call it.
        location: the path as given.
        files: every file it consists of; empty in memory.

    Raises:
        CheckpointError: tensors that nothing handles, or that contradict each other or the configuration.
    """

    def __init__(
        self, source: TensorSource, config: PeftConfig, *, label: str, location: str, files: tuple[Path, ...] = ()
    ) -> None:
        self.label = label
        self.location = location
        self.files = files
        self.base_model = config.base_model_name_or_path
        self.revision = config.revision
        self.task_type = config.task_type
        self.fan_in_fan_out = config.fan_in_fan_out
        self.config = config.raw
        self._source = source
        self._where = f"adapter '{label}'"
        self.modules = _headers(pair_factors(source.specs, where=self._where), config, where=self._where)

    @property
    def identity(self) -> object:
        """The files, or in memory the storage of the tensors."""
        return super().identity if self.files else self._source.identity

    def read(self, module: str) -> LowRankUpdate:
        """The update of one module, both factors as stored and finite."""
        a, b = (self._read_finite(key) for key in tensor_names(module))
        return LowRankUpdate(b, a, self.modules[module].scaling)

    def _read_finite(self, key: str) -> Tensor:
        tensor = self._source.read(key)
        low, high = torch.aminmax(tensor)  # NaN propagates; no mask as large as the tensor
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self._where}: tensor '{key}' holds {count} NaN or infinite values. A merge would spread them: "
                "train or save the adapter again."
            )
        return tensor


class PeftFormat(Format):
    """Directories written by ``PeftModel.save_pretrained``."""

    name: ClassVar[str] = "peft"
    summary: ClassVar[str] = "PEFT LoRA: adapter_config.json with adapter_model.safetensors or .bin, whole or sharded"

    def recognises(self, path: Path) -> bool:
        """Whether the directory, or one directly in it, holds an adapter's files."""
        return path.is_dir() and (
            any((path / name).is_file() for name in (CONFIG_NAME, *_TENSOR_FILES)) or bool(_nested_adapters(path))
        )

    def open(self, path: Path, *, label: str) -> PeftCheckpoint:
        """The adapter in ``path``."""
        where = f"adapter '{label}'"
        config_path, tensor_path = _config_file(path, where), _tensor_file(path, where)
        config = read_config(config_path, where=where)
        source = open_tensors(tensor_path)
        files = (config_path, *source.files)
        return PeftCheckpoint(source, config, label=label, location=str(path), files=files)


def _headers(pairs: Mapping[str, FactorPair], config: PeftConfig, *, where: str) -> dict[str, ModuleHeader]:
    """What is known of each module, once the configuration is found not to contradict the tensors."""
    findings = Findings(where)
    headers: dict[str, ModuleHeader] = {}
    for module, (a, b) in pairs.items():
        rank, claimed = a.shape[0], config.rank_of(module)
        if claimed != rank:
            findings.add(
                f"{CONFIG_NAME} contradicts the ranks of the tensors",
                f"module '{module}' (configuration {claimed}, tensors {rank})",
                "Its scaling would be wrong: correct 'r' or 'rank_pattern', or take both files from the same save.",
            )
        headers[module] = ModuleHeader(
            name=module,
            d_out=b.shape[0],
            d_in=a.shape[1],
            rank=rank,
            scaling=config.scaling_of(module, rank=rank),
            dtype=torch.promote_types(a.dtype, b.dtype),
            stored_bytes=a.stored_bytes + b.stored_bytes,
        )
    findings.raise_all()
    return headers


def _nested_adapters(path: Path) -> list[Path]:
    return sorted(config.parent for config in path.glob(f"*/{CONFIG_NAME}"))


def _config_file(path: Path, where: str) -> Path:
    config = path / CONFIG_NAME
    if config.is_file():
        return config
    nested = _nested_adapters(path)
    if nested:
        names = ", ".join(f"'{directory}'" for directory in nested)
        raise CheckpointError(
            f"{where}: {path} has no {CONFIG_NAME}, but there is one in {names}. PEFT puts adapters that are not "
            "called 'default' in a sub-directory: give that path."
        )
    raise CheckpointError(
        f"{where}: {path} has no {CONFIG_NAME}. Without it the scaling is unknown: download it again."
    )


def _tensor_file(path: Path, where: str) -> Path:
    if (path / _SIDE_FILE).is_file():
        raise CheckpointError(
            f"{where}: {path} holds {_SIDE_FILE}, whole tensors beside the adapter (LLaVA), which a merge of factors "
            "would drop. Move the file out of the directory to merge the low-rank part alone."
        )
    found = next((path / name for name in _TENSOR_FILES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{where}: {path} has none of {', '.join(_TENSOR_FILES)}. Download the whole adapter.")
    return found
