"""What this package reads and writes, against peft itself."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_lowrank.formats import LINEAR, Adapter, PeftFormat, output_config, tensor_names
from mergekit_lowrank.lowrank import densify


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(5, 7)
        self.xq = nn.Linear(5, 3)
        self.v = nn.Linear(7, 4)
        self.c = Conv1D(6, 5)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(Block() for _ in range(1))


def tuned(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Tiny(), LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}))


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = model.base_model.model.named_modules()
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers if hasattr(layer, "lora_A")}


VARIANTS = [
    {},
    {"use_rslora": True},
    {"target_modules": ["q", "v", "xq"], "rank_pattern": {"q": 1, r"layers\.1\.v": 2}, "alpha_pattern": {"v": 8}},
    {
        "target_modules": r".*\.(q|v)",
        "rank_pattern": {r"^layers\.0\.q": 4},
        "alpha_pattern": {"q": 2, "layers.0.q": 99},
    },
    {"use_rslora": True, "rank_pattern": {"q": 2}, "alpha_pattern": {"layers.0.q": 7}},
    {"target_modules": ["c"], "fan_in_fan_out": True},
]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("safe", [True, False])
def test_the_delta_read_equals_the_delta_of_peft(tmp_path, settings, safe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, on rsLoRA with patterns and on pickles
        model = tuned(**{"target_modules": ["q", "v"], **settings})
        if safe:
            model.save_pretrained(tmp_path)
        else:
            torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
            model.peft_config["default"].save_pretrained(tmp_path)
        # Reloaded, because save_pretrained sorts the patterns, which may change the one that wins.
        expected = deltas(PeftModel.from_pretrained(Tiny(), tmp_path))
    checkpoint = PeftFormat().open(tmp_path, label="tiny")
    assert set(checkpoint.modules) == set(expected)
    for module, delta in expected.items():
        ours = densify(checkpoint.read(module))
        assert torch.allclose(ours.T if checkpoint.fan_in_fan_out else ours, delta, rtol=1e-6, atol=1e-7)


def test_a_model_in_memory_opens_like_its_directory(tmp_path):
    model = tuned(target_modules={"q", "v"}, rank_pattern={"v": 2})
    model.save_pretrained(tmp_path)
    on_disk = PeftFormat().open(tmp_path, label="tiny")
    in_memory = Adapter(get_peft_model_state_dict(model), model.peft_config["default"]).open(label="tiny")
    assert dict(in_memory.modules) == dict(on_disk.modules)
    assert in_memory.files == ()
    assert in_memory.config["peft_type"] == "LORA"
    for module in on_disk.modules:
        assert torch.equal(in_memory.read(module).a, on_disk.read(module).a)
        assert torch.equal(in_memory.read(module).b, on_disk.read(module).b)


def test_an_adapter_saved_here_loads_in_peft(tmp_path):
    model = tuned(target_modules=["q", "v"], use_rslora=True)
    Adapter(get_peft_model_state_dict(model), model.peft_config["default"]).save(tmp_path / "saved")
    again = PeftModel.from_pretrained(Tiny(), tmp_path / "saved")
    for module, delta in deltas(model).items():
        assert torch.equal(deltas(again)[module], delta)


NESTED = {"layers.0.q": 1, "layers.0.xq": 2, "layers.1.q": 3, "inner.layers.0.q": 2, "inner.layers.0.xq": 4}


@pytest.mark.parametrize("ranks", [NESTED, dict.fromkeys(NESTED, 3), dict(reversed(NESTED.items()))])
def test_peft_gives_each_module_of_the_output_its_own_rank_and_scaling_one(tmp_path, ranks):
    settings = output_config(
        base_model="org/base", revision=None, task_type=None, layouts=dict.fromkeys(ranks, LINEAR), ranks=ranks
    )
    shapes = {name: layer.weight.shape for name, layer in Tiny().named_modules() if isinstance(layer, nn.Linear)}
    tensors = {}
    for module, rank in ranks.items():
        key_a, key_b = tensor_names(module)
        tensors[key_a] = torch.randn(rank, shapes[module][1])
        tensors[key_b] = torch.randn(shapes[module][0], rank)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    model = PeftModel.from_pretrained(Tiny(), tmp_path)
    assert set(deltas(model)) == set(ranks)
    for module, rank in ranks.items():
        layer = model.base_model.model.get_submodule(module)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)
        key_a, key_b = tensor_names(module)
        assert torch.equal(layer.get_delta_weight("default"), tensors[key_b] @ tensors[key_a])
    assert {header.scaling for header in PeftFormat().open(tmp_path, label="out").modules.values()} == {1.0}


def test_the_default_output_is_the_one_convention_that_every_server_reads():
    ranks = {"b.v": 8, "a.q": 8}
    settings = output_config(
        base_model="org/base",
        revision="main",
        task_type="CAUSAL_LM",
        layouts=dict.fromkeys(ranks, LINEAR),
        ranks=ranks,
    )
    assert settings["r"] == settings["lora_alpha"] == 8
    assert settings["target_modules"] == ["a.q", "b.v"]
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert (settings["use_rslora"], settings["bias"], settings["lora_dropout"]) == (False, "none", 0.0)
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", "main")
    LoraConfig(**settings)


def test_equal_ranks_need_no_pattern():
    ranks = {"a": 2, "b": 2}
    settings = output_config(
        base_model=None, revision=None, task_type=None, layouts=dict.fromkeys(ranks, LINEAR), ranks=ranks
    )
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}


module_names = st.from_regex(r"[ab]{1,2}(\.[ab01+\-(|*]{1,2}){0,3}", fullmatch=True)


@given(st.dictionaries(module_names, st.integers(1, 9), min_size=1, max_size=8))
def test_a_pattern_key_hits_its_module_and_no_other(ranks):
    settings = output_config(
        base_model=None, revision=None, task_type=None, layouts=dict.fromkeys(ranks, LINEAR), ranks=ranks, rank=5
    )
    patterns = settings["rank_pattern"]
    for module, rank in ranks.items():
        assert patterns.get(get_pattern_key(patterns, module), 5) == rank
        assert patterns.get(get_pattern_key(patterns, f"x.{module}"), 5) == ranks.get(f"x.{module}", 5)
