"""PEFT adapters, in each layout on disk, keep the contract of formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank import Registry
from mergekit_lowrank.formats import tensor_names
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.testing import FormatContract


class PeftContract(FormatContract):
    format = "peft"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @classmethod
    def registry(cls) -> Registry:
        return Registry()

    def write(self, directory: Path, updates: Mapping[str, LowRankUpdate]) -> Path:
        settings = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "rank_pattern": {name: update.rank for name, update in updates.items()},
            "alpha_pattern": {name: update.scaling * update.rank for name, update in updates.items()},
        }
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        tensors: dict[str, Tensor] = {}
        for name, update in updates.items():
            key_a, key_b = tensor_names(name)
            tensors |= {key_a: update.a, key_b: update.b}
        self.save(tensors, directory)
        return directory

    def save(self, tensors: Mapping[str, Tensor], directory: Path) -> None:
        save_file(dict(tensors), directory / "adapter_model.safetensors")


class TestSafetensors(PeftContract):
    pass


class TestPickled(PeftContract):
    maps_files = True

    def save(self, tensors: Mapping[str, Tensor], directory: Path) -> None:
        torch.save(dict(tensors), directory / "adapter_model.bin")


class TestSharded(PeftContract):
    def save(self, tensors: Mapping[str, Tensor], directory: Path) -> None:
        shards = {key: f"adapter_model-{number % 2}.safetensors" for number, key in enumerate(tensors)}
        for shard in sorted(set(shards.values())):
            save_file({key: tensors[key] for key, own in shards.items() if own == shard}, directory / shard)
        index = {"metadata": {}, "weight_map": shards}
        (directory / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def test_every_built_in_format_is_covered() -> None:
    assert set(Registry().formats) == {PeftContract.format, "model"}  # of fine-tunes: test_fine_tune.py


def test_a_contract_says_that_it_needs_a_writer(tmp_path: Path) -> None:
    class Incomplete(FormatContract):
        format = "peft"

    with pytest.raises(NotImplementedError, match="Incomplete must say how a checkpoint is written"):
        Incomplete().write(tmp_path, {})
