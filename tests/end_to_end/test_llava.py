"""Adapters as LLaVA writes them: factors in one pickle, a projector in another, both merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError, OutputError, merge, plan
from tests.formats.builders import config, state_dict

PROJECTOR = {"mm_projector.0.weight": (4, 3), "mm_projector.0.bias": (4,), "mm_projector.2.weight": (4, 4)}
PREFIX = "base_model.model.model."
MODEL = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 3}


def projector(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{PREFIX}{name}": torch.randn(shape, generator=generator).to(dtype) for name, shape in PROJECTOR.items()}


def write_llava(path: Path, number: int, dtype: torch.dtype = torch.bfloat16, **changes: object) -> str:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config(task_type="CAUSAL_LM", lora_bias=False)))
    (path / "config.json").write_text(json.dumps({**MODEL, **changes}))
    torch.save({key: number * own.to(dtype) for key, own in state_dict().items()}, path / "adapter_model.bin")
    torch.save(projector(number, dtype), path / "non_lora_trainables.bin")
    return str(path)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The projector by LLaVA's names for its own model (llava/model/builder.py, ``load_pretrained_model``)."""
    tensors = torch.load(path / "non_lora_trainables.bin", map_location="cpu", weights_only=True)
    tensors = {key[11:] if key.startswith("base_model.") else key: own for key, own in tensors.items()}
    if any(key.startswith("model.model.") for key in tensors):
        tensors = {key[6:] if key.startswith("model.") else key: own for key, own in tensors.items()}
    return tensors


def recipe_of(paths, given=(0.75, 0.25), **keys):
    models = [{"model": path, "parameters": {"weight": w}} for path, w in zip(paths, given, strict=True)]
    return {"merge_method": "robustmerge", "models": models, "extras": "average", **keys}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_projectors_are_averaged_where_llava_looks_for_them(tmp_path, dtype):
    paths = [write_llava(tmp_path / f"in{seed}", seed, dtype) for seed in (1, 2)]
    merge(recipe_of(paths), tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.keys() == {f"model.{name}" for name in PROJECTOR}
    first, second = projector(1, dtype), projector(2, dtype)
    for name, shape in PROJECTOR.items():
        expected = 0.75 * first[PREFIX + name].float() + 0.25 * second[PREFIX + name].float()
        assert found[f"model.{name}"].dtype == dtype
        assert found[f"model.{name}"].shape == shape
        assert torch.equal(found[f"model.{name}"], expected.to(dtype))
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == state_dict().keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == MODEL
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"non_lora_trainables.bin", "config.json"} <= {own["name"] for own in listed["outputs"]}


def test_the_output_is_an_input_again(tmp_path):
    paths = [write_llava(tmp_path / f"in{seed}", seed) for seed in (1, 2)]
    merge(recipe_of(paths), tmp_path / "out")
    again = recipe_of([str(tmp_path / "out")], [1.0])
    merge(again, tmp_path / "again")
    first, second = loaded(tmp_path / "out"), loaded(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], own) for key, own in first.items())


def test_without_a_policy_the_projector_is_not_dropped_in_silence(tmp_path):
    recipe = recipe_of([write_llava(tmp_path / "in1", 1)], [1.0], extras="error")
    with pytest.raises(
        CheckpointError, match=r"'in1' holds 3 tensors that are no low-rank factors: 'base_model\.model\."
    ):
        plan(recipe)


def test_left_out_there_is_no_side_file(tmp_path):
    merge(recipe_of([write_llava(tmp_path / "in1", 1)], [1.0], extras={"from": "base_model"}), tmp_path / "out")
    assert not {"non_lora_trainables.bin", "config.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_configurations_that_differ_are_a_warning_and_the_first_is_taken(tmp_path):
    paths = [write_llava(tmp_path / f"in{seed}", seed, seed=seed) for seed in (1, 2)]
    report = merge(recipe_of(paths), tmp_path / "out")
    expected = (
        f"the inputs differ in config.json, which goes beside non_lora_trainables.bin; the output gets '{paths[0]}"
    )
    assert any(warning.startswith(expected) for warning in report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == 1


def test_a_side_file_has_no_place_in_memory(tmp_path):
    with pytest.raises(OutputError, match=r"non_lora_trainables\.bin, which an adapter in memory has no place for"):
        merge(recipe_of([write_llava(tmp_path / "in1", 1)], [1.0]))
