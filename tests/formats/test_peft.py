from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        (
            {"base_model.model.e.lora_embedding_A": ones(2, 3)},
            "factors without their lora_embedding_B: 'base_model.model.e.lora_embedding_A'.",
        ),
        (
            {"base_model.model.e.lora_embedding_A.default": ones(2, 3)},
            "keys with the name of an adapter left in: 'base_model.model.e.lora_embedding_A.default'.",
        ),
        (
            {"base_model.model.q.lora_magnitude_vector": ones(2)},
            "tensors of factors that are missing: 'base_model.model.q.lora_magnitude_vector'.",
        ),
        (
            {"base_model.model.layers.0.q.lora_magnitude_vector.weight": ones(5)},
            "adapter_config.json does not say 'use_dora', and modules have a magnitude: 'layers.0.q'.",
        ),
        (
            {"base_model.model.q.lora_B.bias": ones(2)},
            "tensors of factors that are missing: 'base_model.model.q.lora_B.bias'.",
        ),
        ({"base_model.model.q.lora_A.bias": ones(2)}, "biases of lora_A, which peft never writes"),
        (
            {"base_model.model.head.original_module.weight": ones(2)},
            "copies of the base's tensors ('original_module'): 'base_model.model.head.original_module.weight'.",
        ),
        (
            {
                "base_model.model.head.base_layer.weight": ones(2),
                "base_model.model.head.weight": ones(2),
            },
            "parameters that are there twice: 'head.weight' ('base_model.model.head.base_layer.weight' and",
        ),
        ({"head.weight": ones(2)}, "keys without the prefix 'base_model.model.': 'head.weight'."),
        (
            {"lora_unet_q.lora_down.weight": ones(2)},
            "tensors that nothing here handles: 'lora_unet_q.lora_down",
        ),
        ({"base_model.model.x.ia3_l": ones(2)}, "tensors that nothing here handles: 'base_model.model.x.ia3_l'."),
        (
            {A: ones(2, 3, 3, 3), B: ones(4, 2, 3, 3)},
            "factors that are no matrices and no convolutions: 'q' (lora_A [2, 3, 3, 3], lora_B [4, 2, 3, 3])",
        ),
        ({A: ones(3), B: ones(4, 3)}, "factors that are no matrices and no convolutions: 'q' (lora_A [3]"),
        ({A: ones(2, 3, 3), B: ones(4, 1, 1)}, "they are of a grouped convolution, which is not handled"),
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
    extra |= {f"base_model.model.layers.{number}.q.lora_A.bias": ones(2) for number in range(4)}
    with pytest.raises(CheckpointError) as caught:
        opened(write_adapter(tmp_path, {**state_dict(), **extra}, config()))
    assert len(caught.value.problems) == 2
    assert "and 195 more." in str(caught.value)
    assert "and 1 more." in str(caught.value)


def test_the_only_adapter_in_a_sub_directory_is_opened(tmp_path):
    inner = write_adapter(tmp_path / "outer" / "math", state_dict(), config())
    assert PeftFormat().recognises(tmp_path / "outer")
    checkpoint = opened(tmp_path / "outer")
    assert checkpoint.location == str(tmp_path / "outer")
    assert checkpoint.files == (inner / "adapter_config.json", inner / "adapter_model.safetensors")


def test_adapters_in_sub_directories_are_pointed_at(tmp_path):
    for name in ("code", "math"):
        write_adapter(tmp_path / "outer" / name, state_dict(), config())
    message = error_of(tmp_path / "outer")
    assert f"there is one in '{tmp_path / 'outer' / 'code'}', '{tmp_path / 'outer' / 'math'}'" in message
    assert message.endswith("give that path.")


def test_tensors_are_not_taken_from_one_adapter_and_the_configuration_from_another(tmp_path):
    write_adapter(tmp_path / "math", state_dict(), config())
    save_file(state_dict(), tmp_path / "adapter_model.safetensors")
    assert "has no adapter_config.json, but there is one in" in error_of(tmp_path)


def test_a_missing_configuration_is_named(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "adapter_config.json").unlink()
    assert PeftFormat().recognises(tmp_path)
    assert "has no adapter_config.json. Without it the scaling is unknown" in error_of(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "has none of adapter_model.safetensors, " in error_of(tmp_path)


P = "base_model.model."


def test_whole_tensors_are_told_by_the_parameters_they_replace(tmp_path):
    whole = {
        f"{P}head.weight": ones(4, 2),
        f"{P}norm.modules_to_save.weight": ones(3),
        f"{P}layers.0.q.base_layer.bias": ones(5).half(),
        f"{P}layers.0.o.bias": ones(5),
    }
    settings = config(modules_to_save=["head", "norm"], bias="all")
    checkpoint = opened(write_adapter(tmp_path, {**state_dict(), **whole}, settings))
    assert tuple(checkpoint.modules) == MODULES
    found = {name: (own.key, own.shape, own.dtype, own.saved_under) for name, own in checkpoint.extras.items()}
    assert found == {
        "head.weight": (f"{P}head.weight", (4, 2), torch.float32, "head"),
        "norm.weight": (f"{P}norm.modules_to_save.weight", (3,), torch.float32, "norm"),
        "layers.0.q.bias": (f"{P}layers.0.q.base_layer.bias", (5,), torch.float16, None),
        "layers.0.o.bias": (f"{P}layers.0.o.bias", (5,), torch.float32, None),
    }
    assert torch.equal(checkpoint.read_extra("head.weight", slice(1, 3)), ones(2, 2))
    assert torch.equal(checkpoint.read_extra("norm.weight", slice(None)), ones(1, 3))


def test_a_saved_module_that_peft_stored_under_both_its_names_is_read_once(tmp_path):
    both = {f"{P}head.modules_to_save.weight": ones(4, 2), f"{P}head.weight": ones(4, 2)}
    settings = config(modules_to_save=["head"])
    checkpoint = opened(write_adapter(tmp_path, {**state_dict(), **both}, settings))
    assert {name: extra.key for name, extra in checkpoint.extras.items()} == {"head.weight": f"{P}head.weight"}


def test_a_whole_tensor_that_is_not_finite_is_named_when_read(tmp_path):
    checkpoint = opened(
        write_adapter(tmp_path, {**state_dict(), f"{P}head.weight": ones(2, 2) / 0}, config(modules_to_save=["head"]))
    )
    with pytest.raises(CheckpointError, match=r"tensor 'base_model\.model\.head\.weight' holds 4 NaN or infinite"):
        checkpoint.read_extra("head.weight", slice(None))


ROWS = f"{P}e.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("given", [[5, 2], {"e": [5, 2]}])
def test_trained_rows_are_told_by_their_numbers(tmp_path, given):
    rows = torch.arange(6.0).reshape(2, 3)
    settings = config(trainable_token_indices=given)
    checkpoint = opened(write_adapter(tmp_path, {**state_dict(), ROWS: rows}, settings))
    extra = checkpoint.extras["e.weight"]
    assert (extra.key, extra.tokens, extra.shape) == (ROWS, (5, 2), (2, 3))
    assert torch.equal(checkpoint.read_extra("e.weight", slice(1, 2)), rows[1:])


@pytest.mark.parametrize(
    ("given", "said"), [(None, "names no rows"), ([1, 2, 3], "names 3 rows"), ({"other": [1, 2]}, "names no rows")]
)
def test_rows_that_the_configuration_does_not_name_are_refused(tmp_path, given, said):
    message = error_of(
        write_adapter(tmp_path, {**state_dict(), ROWS: ones(2, 3)}, config(trainable_token_indices=given))
    )
    assert f"'trainable_token_indices' {said} of 'e', and tensor '{ROWS}' is [2, 3]." in message


def test_a_bias_of_lora_b_is_an_update_of_its_own(tmp_path):
    tensors = {**state_dict(["q"]), f"{P}q.lora_B.bias": torch.arange(5.0)}
    checkpoint = opened(write_adapter(tmp_path, tensors, config(lora_bias=True)))
    header = checkpoint.modules["q.bias"]
    assert (header.d_out, header.d_in, header.scaling, header.is_dense, header.kind) == (1, 5, 2.0, True, "vector")
    assert torch.equal(checkpoint.read("q.bias").rows(slice(None)), 2 * torch.arange(5.0)[None])


def test_fused_experts_are_modules_of_their_own(tmp_path):
    tensors = state_dict(["mlp.experts"], rank=6)  # three of rank 2
    settings = config(target_parameters=["mlp.experts.down_proj"])
    checkpoint = opened(write_adapter(tmp_path, tensors, settings))
    assert {name: own.rank for name, own in checkpoint.modules.items()} == {f"mlp.experts[{e}]": 2 for e in range(3)}
    a, b = (tensors[name] for name in tensor_names("mlp.experts"))
    update = checkpoint.read("mlp.experts[1]")
    assert torch.equal(update.a, a[2:4])
    assert torch.equal(update.b, b[:, 1::3])


def test_experts_that_are_no_multiple_of_the_rank_are_refused(tmp_path):
    settings = config(target_parameters=["mlp.experts.down_proj"])
    message = error_of(write_adapter(tmp_path, state_dict(["mlp.experts"], rank=5), settings))
    assert "fused experts whose factors are no multiple of the rank: 'mlp.experts' (lora_A [5, 3], rank 2)." in message


def test_magnitudes_need_the_base(tmp_path):
    tensors = {**state_dict(["q"]), f"{P}q.lora_magnitude_vector": ones(5)}
    checkpoint = opened(write_adapter(tmp_path, tensors, config(use_dora=True)))
    assert checkpoint.needs_base.startswith("it is a DoRA adapter, which rescales the base's weights")


def test_a_dora_adapter_without_magnitudes_is_refused(tmp_path):
    message = error_of(write_adapter(tmp_path, state_dict(["q"]), config(use_dora=True)))
    assert message == (
        "adapter 'math': adapter_config.json says 'use_dora', and modules have no magnitude: 'q'. Take both files "
        "from the same save."
    )


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
    ],
)
def test_a_llava_projector_goes_by_the_name_that_llava_gives_it(tmp_path, stored, name):
    write_adapter(tmp_path, state_dict(), config())
    torch.save({stored: ones(2, 3).half()}, tmp_path / "non_lora_trainables.bin")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = opened(tmp_path)
    (extra,) = checkpoint.extras.values()
    assert (extra.name, extra.key, extra.in_side_file) == (name, stored, True)
    assert torch.equal(checkpoint.read_extra(name, slice(0, 1)), ones(1, 3).half())
    assert checkpoint.files[-2:] == (tmp_path / "non_lora_trainables.bin", tmp_path / "config.json")


def test_a_broken_side_file_is_named(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    (tmp_path / "non_lora_trainables.bin").touch()
    assert "non_lora_trainables.bin: not a valid PyTorch file" in error_of(tmp_path)


def test_other_directories_are_not_recognised(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert not PeftFormat().recognises(tmp_path)
    assert not PeftFormat().recognises(tmp_path / "model.safetensors")
    assert not PeftFormat().recognises(tmp_path / "missing")


def test_configuration_problems_name_the_adapter_and_the_file(tmp_path):
    message = error_of(write_adapter(tmp_path, state_dict(), config(use_qalora=True)))
    assert message.startswith("adapter 'math': adapter_config.json: 'use_qalora' is set to True, which is not handled")


def test_reading_leaves_the_file_as_it_was(tmp_path):
    write_adapter(tmp_path, state_dict(), config())
    opened(tmp_path).read("layers.0.q").a.zero_()
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")[tensor_names("layers.0.q")[0]],
        state_dict()[tensor_names("layers.0.q")[0]],
    )
