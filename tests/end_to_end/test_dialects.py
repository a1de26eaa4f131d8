"""One adapter in every dialect that a merge can write, and what it is when it is read again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError, merge, plan
from tests.formats.builders import P, config, state_dict, variants, write_adapter


def recipe_of(paths, **keys):
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    return {"merge_method": "task_arithmetic", "models": models, **keys}


def pair(root, name):
    tensors, settings = variants()[name]
    return [write_adapter(root / f"in{n}", {k: t / n for k, t in tensors.items()}, settings) for n in (1, 2)]


@pytest.mark.parametrize("name", ["linear", "rslora", "patterns", "embedding", "convolutions", "experts"])
def test_what_servers_read_is_one_rank_with_all_scaling_in_the_factors(tmp_path, name):
    merge(recipe_of(pair(tmp_path, name)), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"]
    assert (settings["use_rslora"], settings["rank_pattern"], settings["alpha_pattern"]) == (False, {}, {})


def test_whatever_files_an_adapter_lies_in_it_merges_to_the_same_bytes(tmp_path):
    tensors, settings = state_dict(), config()
    whole = write_adapter(tmp_path / "whole", tensors, settings)
    nested = write_adapter(tmp_path / "nested" / "math", tensors, settings).parent
    pickled = write_adapter(tmp_path / "pickled", tensors, settings)
    torch.save(tensors, pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    sharded = write_adapter(tmp_path / "sharded", tensors, settings)
    (sharded / "adapter_model.safetensors").rename(sharded / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (sharded / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    found = []
    for n, path in enumerate((whole, nested, pickled, sharded)):
        merge(recipe_of([path]), tmp_path / f"out{n}")
        found.append(load_file(tmp_path / f"out{n}" / "adapter_model.safetensors"))
    assert all(torch.equal(other[key], own) for other in found[1:] for key, own in found[0].items())


def test_a_dialect_that_has_no_place_for_whole_tensors_refuses_them_by_name(tmp_path):
    path = write_adapter(
        tmp_path / "in", {**state_dict(), f"{P}head.weight": torch.ones(2, 3)}, config(modules_to_save=["head"])
    )
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="head"):
        plan(recipe_of([path], extras="average", base_model=str(base), output={"format": "gguf"}))
