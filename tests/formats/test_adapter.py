from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import pytest
import torch

from mergekit_lowrank.errors import CheckpointError, OutputError
from mergekit_lowrank.formats import Adapter, PeftFormat, new_directory, tensor_names

from .builders import MODULES, config, state_dict


class Task(str, Enum):
    TEXT = "CAUSAL_LM"


class Settings:
    def to_dict(self):
        return config(
            task_type=Task.TEXT, target_modules={"v", "q"}, layers_to_transform=(1, 2), auto_mapping=Path("x")
        )


def test_a_saved_adapter_opens_as_it_was(tmp_path):
    tensors = state_dict(dtype=torch.bfloat16)
    path = Adapter(tensors, Settings()).save(tmp_path / "deep" / "math")
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [entry.name for entry in path.parent.iterdir()] == ["math"]
    checkpoint = PeftFormat().open(path, label="math")
    assert checkpoint.config["target_modules"] == ["q", "v"]
    assert checkpoint.config["layers_to_transform"] == [1, 2]
    assert checkpoint.task_type == "CAUSAL_LM"
    for module in MODULES:
        assert torch.equal(checkpoint.read(module).a, tensors[tensor_names(module)[0]])


def test_factors_that_share_storage_or_are_views_are_saved(tmp_path):
    shared = torch.randn(2, 2)
    tensors = {tensor_names("q")[0]: shared, tensor_names("q")[1]: shared.T}
    update = PeftFormat().open(Adapter(tensors, config()).save(tmp_path / "x"), label="x").read("q")
    assert torch.equal(update.a, shared)
    assert torch.equal(update.b, shared.T)


def test_the_order_of_patterns_is_kept(tmp_path):
    patterns = {r"layers\.1\.q": 8, "q": 6, "layers.0.q": 4}
    path = Adapter(state_dict(), config(alpha_pattern=patterns)).save(tmp_path / "x")
    assert PeftFormat().open(path, label="x").modules["layers.0.q"].scaling == 3.0


def test_an_existing_directory_is_not_overwritten_unless_asked(tmp_path):
    path = Adapter(state_dict(), config()).save(tmp_path / "math")
    with pytest.raises(OutputError, match=r"exists already\. .* \(--overwrite\)\."):
        Adapter(state_dict(), config(lora_alpha=8)).save(path)
    Adapter(state_dict(), config(lora_alpha=8)).save(path, overwrite=True)
    assert json.loads((path / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["math"]


def test_what_is_not_an_adapter_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex', which no merge writes, and is not overwritten"):
        Adapter(state_dict(), config()).save(tmp_path / "home", overwrite=True)
    with pytest.raises(OutputError, match="is not an adapter, and is not overwritten"):
        Adapter(state_dict(), config()).save(tmp_path / "home" / "thesis.tex", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_interrupted_save_leaves_nothing_behind_and_keeps_the_old(tmp_path):
    path = Adapter(state_dict(), config()).save(tmp_path / "math")
    before = (path / "adapter_model.safetensors").read_bytes()

    def interrupted() -> None:
        with new_directory(path, overwrite=True) as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["math"]
    assert (path / "adapter_model.safetensors").read_bytes() == before


def test_what_an_earlier_crash_left_is_replaced(tmp_path):
    (tmp_path / ".math.partial").mkdir()
    (tmp_path / ".math.partial" / "half").touch()
    path = Adapter(state_dict(), config()).save(tmp_path / "math")
    assert [entry.name for entry in tmp_path.iterdir()] == ["math"]
    assert not (path / "half").exists()


def test_a_path_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Adapter(state_dict(), config()).save(tmp_path / "file" / "math")


def test_a_configuration_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config field 'auto_mapping' is a object, which JSON cannot hold"):
        Adapter(state_dict(), config(auto_mapping={"a": object()})).save(tmp_path / "x")


def test_an_adapter_in_memory_is_checked_like_one_on_disk():
    with pytest.raises(CheckpointError, match="adapter 'math': keys with the name of an adapter left in"):
        Adapter({"base_model.model.q.lora_A.default.weight": torch.ones(2, 2)}, config()).open(label="math")
    with pytest.raises(CheckpointError, match="adapter 'math': config: 'use_qalora' is set to True"):
        Adapter(state_dict(), config(use_qalora=True)).open(label="math")
    with pytest.raises(CheckpointError, match="adapter 'math': entry 'q' is a int; expected tensors by name only"):
        Adapter({"q": 3}, config()).open(label="math")


def test_factors_in_memory_are_not_copied_nor_tracked():
    tensors = {key: torch.nn.Parameter(tensor) for key, tensor in state_dict().items()}
    update = Adapter(tensors, config()).open(label="math").read("layers.0.q")
    assert update.a.data_ptr() == tensors[tensor_names("layers.0.q")[0]].data_ptr()
    assert not update.a.requires_grad
