"""Adapters written as they are: nothing is lost, and nothing is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError
from mergekit_lowrank.formats import (
    LINEAR,
    Adapter,
    Convolution,
    Derived,
    Embedding,
    Expert,
    PeftFormat,
    PeftWriter,
    TokenRow,
    Whole,
    output_config,
)

from .builders import config, state_dict, variants, write_adapter


class Wrapped(Derived):
    """An adapter whose configuration is not PEFT's own."""


def written(checkpoint, path):
    path.mkdir()
    PeftWriter().write(checkpoint, path)
    return PeftFormat().open(path, label="again")


@pytest.mark.parametrize("name", variants())
def test_what_is_written_is_what_was_read_bit_for_bit(tmp_path, name) -> None:
    tensors, settings = variants()[name]
    checkpoint = PeftFormat().open(write_adapter(tmp_path / "in", tensors, settings), label="math")
    again = written(checkpoint, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == tensor.dtype
        assert torch.equal(stored[key], tensor)
    assert again.modules == checkpoint.modules
    assert again.extras == checkpoint.extras
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == settings


@pytest.mark.parametrize("name", ["linear", "rslora", "patterns", "embedding", "convolutions", "lora_bias", "experts"])
def test_ranks_and_scalings_of_another_dialect_are_said_in_patterns(tmp_path, name) -> None:
    tensors, settings = variants()[name]
    checkpoint = Adapter(tensors, settings).open(label="math")
    again = written(Wrapped(checkpoint), tmp_path / "out")
    assert again.modules.keys() == checkpoint.modules.keys()
    for module, own in checkpoint.modules.items():
        assert again.modules[module].rank == own.rank
        assert again.modules[module].scaling == pytest.approx(own.scaling, rel=1e-12)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in tensors.items())


def test_factors_of_two_types_keep_them(tmp_path) -> None:
    tensors = state_dict(["q"])
    tensors["base_model.model.q.lora_A.weight"] = tensors["base_model.model.q.lora_A.weight"].half()
    written(Adapter(tensors, config()).open(label="math"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == {key: own.dtype for key, own in tensors.items()}


def test_a_side_file_stays_one(tmp_path) -> None:
    path = write_adapter(tmp_path / "in", state_dict(), config())
    side = {"base_model.model.model.mm_projector.0.bias": torch.arange(3.0).half()}
    torch.save(side, path / "non_lora_trainables.bin")
    written(PeftFormat().open(path, label="math"), tmp_path / "out")
    again = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    assert again.keys() == side.keys()
    assert torch.equal(*again.values(), *side.values())
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == state_dict().keys()


def test_dora_is_not_written_as_if_it_were_lora(tmp_path) -> None:
    tensors = {**state_dict(["q"]), "base_model.model.q.lora_magnitude_vector": torch.ones(5)}
    checkpoint = Adapter(tensors, config(use_dora=True)).open(label="math")
    with pytest.raises(CheckpointError, match=r"'math': it is a DoRA adapter.*'base_model' in the recipe"):
        PeftWriter().write(checkpoint, tmp_path)


def made(layouts, ranks) -> dict[str, object]:
    return output_config(base_model=None, revision=None, task_type=None, layouts=layouts, ranks=ranks)


def test_the_configuration_says_what_lies_beside_factors() -> None:
    experts = {f"mlp.experts[{e}]": Expert("mlp.experts", e, 2, ("experts.down", "experts.up")) for e in range(2)}
    layouts = {
        "q": LINEAR,
        "table": Embedding(),
        "conv": Convolution(3, (2, 2)),
        **experts,
        "q.bias": Whole("base_model.model.q.lora_B.bias", (4,)),
        "head": Whole("base_model.model.head.weight", (4, 4), saved_under="head"),
        "o.bias": Whole("base_model.model.o.bias", (4,)),
        "e[7]": TokenRow("k", "e", 7),
        "e[2]": TokenRow("k", "e", 2),
    }
    found = made(layouts, dict.fromkeys(["q", "table", "conv", *experts], 2))
    assert found["target_modules"] == ["conv", "q", "table"]
    assert found["target_parameters"] == ["experts.down", "experts.up"]
    assert found["modules_to_save"] == ["head"]
    assert found["trainable_token_indices"] == {"e": [2, 7]}
    assert (found["lora_bias"], found["bias"], found["r"], found["rank_pattern"]) == (True, "all", 2, {})


def test_biases_of_modules_with_factors_are_those_that_peft_calls_lora_only() -> None:
    own = Whole("base_model.model.q.base_layer.bias", (4,))
    assert made({"q": LINEAR, "q.bias": own}, {"q": 2})["bias"] == "lora_only"
    assert made({"q": LINEAR}, {"q": 2})["bias"] == "none"


def test_a_bias_that_is_saved_with_its_module_or_in_a_side_file_is_none_of_peft_s() -> None:
    saved = Whole("base_model.model.norm.bias", (4,), saved_under="norm")
    beside = Whole("model.mm_projector.bias", (4,), in_side_file=True)
    assert made({"q": LINEAR, "a": saved, "b": beside}, {"q": 2})["bias"] == "none"
