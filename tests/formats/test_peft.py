from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import ModuleHeader, PeftCheckpoint, PeftFormat, tensor_names

from .builders import MODULES, config, state_dict, write_adapter


def error_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PeftFormat().open(path, label="math")
    return str(caught.value)


def opened(path) -> PeftCheckpoint:
    return PeftFormat().open(path, label="math")


def test_an_adapter_is_described_before_a_tensor_is_read(tmp_path):
    settings = config(base_model_name_or_path="org/base", revision="main", task_type="CAUSAL_LM", fan_in_fan_out=True)
    checkpoint = opened(write_adapter(tmp_path, state_dict(), settings))
    assert checkpoint.label == "math"
    assert checkpoint.location == str(tmp_path)
    assert checkpoint.files == (tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors")
    assert (checkpoint.base_model, checkpoint.revision, checkpoint.task_type) == ("org/base", "main", "CAUSAL_LM")
    assert checkpoint.fan_in_fan_out is True
    assert checkpoint.config == settings
    assert tuple(checkpoint.modules) == MODULES
    assert checkpoint.modules["layers.0.q"] == ModuleHeader(
        name="layers.0.q", d_out=5, d_in=3, rank=2, scaling=2.0, dtype=torch.float32, stored_bytes=64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_factors_come_back_bit_for_bit(tmp_path, dtype):
    tensors = state_dict(dtype=dtype)
    checkpoint = opened(write_adapter(tmp_path, tensors, config()))
    for module in MODULES:
        update = checkpoint.read(module)
        key_a, key_b = tensor_names(module)
        assert update.a.dtype == update.b.dtype == dtype
        assert torch.equal(update.a, tensors[key_a])
        assert torch.equal(update.b, tensors[key_b])
        assert update.scaling == 2.0


def test_factors_may_differ_in_type(tmp_path):
    tensors = state_dict(["q"])
    tensors[tensor_names("q")[0]] = tensors[tensor_names("q")[0]].half()
    checkpoint = opened(write_adapter(tmp_path, tensors, config()))
    assert checkpoint.modules["q"].dtype == torch.float32
    assert checkpoint.modules["q"].stored_bytes == 2 * 3 * 2 + 5 * 2 * 4
    assert checkpoint.read("q").a.dtype == torch.float16


def test_rank_one_and_different_ranks_are_read(tmp_path):
    tensors = {**state_dict(["q"], rank=1), **state_dict(["v"], rank=3)}
    checkpoint = opened(write_adapter(tmp_path, tensors, config(r=1, rank_pattern={"v": 3})))
    assert [(header.rank, header.scaling) for header in checkpoint.modules.values()] == [(1, 4.0), (3, 4 / 3)]


def test_a_checkpoint_is_read_from_several_threads(tmp_path):
    modules = [f"layers.{number}.q" for number in range(40)]
    tensors = state_dict(modules)
    checkpoint = opened(write_adapter(tmp_path, tensors, config()))
    with ThreadPoolExecutor(8) as pool:
        for module, update in zip(modules, pool.map(checkpoint.read, modules), strict=True):
            assert torch.equal(update.b, tensors[tensor_names(module)[1]])


def test_a_pickled_adapter_is_read(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    torch.save(state_dict(), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert torch.equal(opened(tmp_path).read("layers.0.q").a, state_dict()[tensor_names("layers.0.q")[0]])


def test_a_sharded_adapter_is_read(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state_dict(), "one.safetensors")}))
    checkpoint = opened(tmp_path)
    assert checkpoint.files == (tmp_path / "adapter_config.json", index, tmp_path / "one.safetensors")
    assert set(checkpoint.modules) == set(MODULES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named_when_read(tmp_path, value, dtype):
    tensors = state_dict(["q", "v"], dtype=dtype)
    tensors["base_model.model.v.lora_B.weight"][1, 1] = value
    checkpoint = opened(write_adapter(tmp_path, tensors, config()))
    checkpoint.read("q")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("v")
    expected = "adapter 'math': tensor 'base_model.model.v.lora_B.weight' holds 1 NaN or infinite values"
    assert str(caught.value).startswith(expected)


def test_the_largest_finite_values_are_accepted(tmp_path):
    tensors = {key: torch.full_like(tensor, 65504.0).half() for key, tensor in state_dict().items()}
    opened(write_adapter(tmp_path, tensors, config())).read("layers.0.q")


def test_a_rank_that_contradicts_the_configuration_is_named(tmp_path):
    message = error_of(write_adapter(tmp_path, state_dict(), config(rank_pattern={"v": 3})))
    assert message == (
        "adapter 'math': adapter_config.json contradicts the ranks of the tensors: module 'layers.0.v' (configuration "
        "3, tensors 2). Its scaling would be wrong: correct 'r' or 'rank_pattern', or take both files from the same "
        "save."
    )


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
ones = torch.ones


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({A: ones(2, 3)}, f"factors without their lora_B: '{A}'."),
        ({B: ones(3, 2)}, f"factors without their lora_A: '{B}'."),
        (
            {"q.lora_A.weight": ones(2, 3)},
            "keys without the prefix 'base_model.model.': 'q.lora_A.weight'. Save the adapter with PeftModel",
        ),
        (
            {"base_model.model.q.lora_A.default.weight": ones(2, 3)},
            "keys with the name of an adapter left in: 'base_model.model.q.lora_A.default.weight'. Save the",
        ),
        ({"base_model.model.e.lora_embedding_A": ones(2, 3)}, "LoRA factors of embeddings, which are not handled"),
        ({"base_model.model.q.lora_magnitude_vector": ones(2)}, "DoRA magnitudes, which are not handled"),
        ({"base_model.model.q.lora_magnitude_vector.weight": ones(2)}, "DoRA magnitudes, which are not handled"),
        ({"base_model.model.q.lora_B.bias": ones(2)}, "biases of LoRA factors, which are not handled"),
        ({"base_model.model.head.modules_to_save.weight": ones(2)}, "whole tensors of modules_to_save"),
        ({"base_model.model.head.original_module.weight": ones(2)}, "whole tensors of modules_to_save"),
        ({"base_model.model.q.base_layer.weight": ones(2)}, "whole tensors, which a merge of factors would drop"),
        ({"base_model.model.head.weight": ones(2)}, "whole tensors, which a merge of factors would drop"),
        ({"base_model.model.head.bias": ones(2)}, "whole tensors, which a merge of factors would drop"),
        (
            {"lora_unet_q.lora_down.weight": ones(2)},
            "tensors that nothing here handles: 'lora_unet_q.lora_down",
        ),
        ({"base_model.model.x.ia3_l": ones(2)}, "tensors that nothing here handles: 'base_model.model.x.ia3_l'."),
        (
            {A: ones(2, 3, 3, 3), B: ones(4, 2, 1, 1)},
            "not matrices (of convolutions, or fused), which are not handled: 'q'",
        ),
        (
            {A: ones(3), B: ones(4, 3)},
            "not matrices (of convolutions, or fused), which are not handled: 'q' (lora_A [3]",
        ),
        ({A: ones(2, 3), B: ones(4, 3)}, "factors whose ranks differ: 'q' (lora_A [2, 3], lora_B [4, 3])"),
        ({A: ones(0, 3), B: ones(4, 0)}, "factors without entries: 'q' (lora_A [0, 3], lora_B [4, 0])"),
        ({A: ones(2, 0), B: ones(4, 2)}, "factors without entries: 'q'"),
        ({A: ones(2, 3).int(), B: ones(4, 2)}, f"factors of a type that is not handled: '{A}' (int32)"),
        ({}, "the adapter is empty; expected keys such as 'base_model.model.<module>.lora_A.weight'."),
    ],
)
def test_what_is_not_a_plain_lora_is_named(tmp_path, tensors, expected):
    others = state_dict() if tensors else {}
    message = error_of(write_adapter(tmp_path, {**others, **tensors}, config()))
    assert message.startswith("adapter 'math': ")
    assert expected in message


def test_many_tensors_of_one_kind_make_one_problem(tmp_path):
    extra = {f"base_model.model.layers.{number}.q.lora_magnitude_vector": ones(2) for number in range(200)}
    extra |= {f"base_model.model.layers.{number}.norm.weight": ones(2) for number in range(4)}
    with pytest.raises(CheckpointError) as caught:
        opened(write_adapter(tmp_path, {**state_dict(), **extra}, config()))
    assert len(caught.value.problems) == 2
    assert "and 197 more." in str(caught.value)
    assert "and 1 more." in str(caught.value)


def test_an_adapter_in_a_sub_directory_is_pointed_at(tmp_path):
    write_adapter(tmp_path / "outer" / "math", state_dict(), config())
    assert PeftFormat().recognises(tmp_path / "outer")
    message = error_of(tmp_path / "outer")
    assert f"there is one in '{tmp_path / 'outer' / 'math'}'" in message
    assert message.endswith("give that path.")


def test_a_missing_configuration_is_named(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "adapter_config.json").unlink()
    assert PeftFormat().recognises(tmp_path)
    assert "has no adapter_config.json. Without it the scaling is unknown" in error_of(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "has none of adapter_model.safetensors, " in error_of(tmp_path)


def test_a_llava_projector_is_not_dropped_in_silence(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "non_lora_trainables.bin").touch()
    assert "holds non_lora_trainables.bin, whole tensors beside the adapter (LLaVA)" in error_of(tmp_path)


def test_other_directories_are_not_recognised(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert not PeftFormat().recognises(tmp_path)
    assert not PeftFormat().recognises(tmp_path / "model.safetensors")
    assert not PeftFormat().recognises(tmp_path / "missing")


def test_configuration_problems_name_the_adapter_and_the_file(tmp_path):
    message = error_of(write_adapter(tmp_path, state_dict(), config(use_dora=True)))
    assert message.startswith("adapter 'math': adapter_config.json: 'use_dora' is set to True, which is not handled")


def test_reading_leaves_the_file_as_it_was(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    opened(tmp_path).read("layers.0.q").a.zero_()
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")[tensor_names("layers.0.q")[0]],
        state_dict()[tensor_names("layers.0.q")[0]],
    )
