"""What adapters hold beside low-rank factors, under each policy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import CheckpointError, IncompatibleInputsError, OutputError, RecipeError, finalize, merge, plan
from mergekit_lowrank.lowrank import densify
from tests.end_to_end.unfinished import cut_off, files, followed
from tests.formats.builders import MODULES, P, config, state_dict, variants, weights, write_adapter, write_model

HEAD, NORM, ROWS = f"{P}head.weight", f"{P}norm.weight", f"{P}e.token_adapter.trainable_tokens_delta"
FIRST, SECOND = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, -2.0], [5.0, 0.0]])


def adapter(path, extra, **settings):
    return write_adapter(path, {**state_dict(), **extra}, config(**settings))


def saving(root, values=(FIRST, SECOND)):
    """Adapters with an output layer and a norm saved whole."""
    return [
        adapter(root / f"in{n}", {HEAD: value, NORM: value[0].clone()}, modules_to_save=["head", "norm"])
        for n, value in enumerate(values, 1)
    ]


def rows(root, *tokens):
    """Adapters with trained rows; row t of adapter n is 10 n + t."""
    return [
        adapter(root / f"in{n}", {ROWS: torch.tensor([[10.0 * n + t] * 2 for t in own])}, trainable_token_indices=own)
        for n, own in enumerate(tokens, 1)
    ]


def recipe_of(paths, given=None, **keys):
    given = given or [1.0] * len(paths)
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(paths, given, strict=True)]
    return {"merge_method": "ties", "models": models, **keys}


def merged(recipe, out):
    """The tensors and the configuration of the output."""
    merge(recipe, out)
    return load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())


def test_by_default_they_are_refused_and_all_inputs_that_have_any_named(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        plan(recipe_of(saving(tmp_path)))
    assert len(caught.value.problems) == 2
    first, second = map(str, caught.value.problems)
    assert f"'in1' holds 2 tensors that are no low-rank factors: '{HEAD}', '{NORM}'." in first
    assert "average (of one input: that input), {from: in1}, delta" in first
    assert "or {from: base_model} to leave them out." in first
    assert "'in2' holds 2 tensors" in second


@pytest.mark.parametrize("given", [[0.9, 0.1], [9.0, 1.0]])
def test_the_average_is_by_weight_and_keeps_to_nothing_else(tmp_path, given):
    recipe = recipe_of(saving(tmp_path), given, extras="average", scale=0.5)
    tensors, settings = merged(recipe, tmp_path / "out")
    assert torch.allclose(tensors[HEAD], 0.9 * FIRST + 0.1 * SECOND)
    assert torch.allclose(tensors[NORM], 0.9 * FIRST[0] + 0.1 * SECOND[0])
    assert settings["modules_to_save"] == ["head", "norm"]


@pytest.mark.parametrize("given", [[1.0, -0.5], [0.0, 0.0]])
def test_weights_that_make_no_average_are_refused(tmp_path, given):
    with pytest.raises(RecipeError, match=r"they must not be negative, nor all 0\. Use extras: delta, or \{from"):
        plan(recipe_of(saving(tmp_path), given, extras="average"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_of_one_input_they_are_that_input_s_bit_for_bit(tmp_path, dtype):
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors, _ = merged(recipe_of(saving(tmp_path, [value]), [0.3], extras="average"), tmp_path / "out")
    assert tensors[HEAD].dtype == dtype
    assert torch.equal(tensors[HEAD], value)
    assert torch.equal(tensors[NORM], value[0])


def test_what_one_input_lacks_is_the_other_s(tmp_path):
    paths = [*saving(tmp_path, [FIRST]), adapter(tmp_path / "plain", {})]
    tensors, _ = merged(recipe_of(paths, [0.2, 0.8], extras="average"), tmp_path / "out")
    assert torch.equal(tensors[HEAD], FIRST)


@pytest.mark.parametrize("by_path", [False, True])
def test_those_of_one_model_are_taken_as_they_are(tmp_path, by_path):
    paths = saving(tmp_path)
    asked = str(paths[1]) if by_path else "in2"
    tensors, _ = merged(recipe_of(paths, [0.9, -0.1], extras={"from": asked}), tmp_path / "out")
    assert torch.equal(tensors[HEAD], SECOND)


def test_those_of_the_base_are_left_out(tmp_path):
    tensors, settings = merged(recipe_of(saving(tmp_path), extras={"from": "base_model"}), tmp_path / "out")
    assert tensors.keys() == state_dict().keys()
    assert settings["modules_to_save"] is None


def test_a_model_that_is_none_of_the_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"'in3' is none of the models \(in1, in2\), nor base_model"):
        plan(recipe_of(saving(tmp_path), extras={"from": "in3"}))


BASE = {"head.weight": torch.tensor([[1.0, 1.0], [1.0, 1.0]]), "norm.weight": torch.tensor([1.0, 1.0])}


@pytest.mark.parametrize(
    ("method", "head"),
    [
        # The differences are [[0, 1], [2, 3]] and [[2, -3], [4, -1]].
        ("task_arithmetic", [[2.0, -2.0], [6.0, 2.0]]),
        ("robustmerge", [[1.0, -1.0], [3.0, 1.0]]),  # its stand-in is the mean
        ("drm", [[2.0, -3.0], [3.0, 3.0]]),  # its stand-in elects signs, and takes the mean of those that agree
    ],
)
def test_differences_are_merged_as_all_else_and_added_to_the_base(tmp_path, method, head):
    base = write_model(tmp_path / "base", BASE)
    recipe = recipe_of(saving(tmp_path), extras="delta", base_model=str(base)) | {"merge_method": method}
    tensors, settings = merged(recipe, tmp_path / "out")
    assert torch.allclose(tensors[HEAD], torch.tensor(head) + BASE["head.weight"])
    assert settings["modules_to_save"] == ["head", "norm"]


def test_differences_take_negative_weights(tmp_path):
    base = write_model(tmp_path / "base", BASE)
    recipe = recipe_of(saving(tmp_path), [1.0, -1.0], extras="delta", base_model=str(base))
    tensors, _ = merged(recipe | {"merge_method": "task_arithmetic"}, tmp_path / "out")
    assert torch.allclose(tensors[HEAD], FIRST - SECOND + BASE["head.weight"])


def test_differences_need_a_base(tmp_path):
    with pytest.raises(CheckpointError, match="merged as the difference to the base, and none is given: add 'base_mo"):
        plan(recipe_of(saving(tmp_path), extras="delta"))


def test_differences_need_a_base_of_the_same_shape(tmp_path):
    base = write_model(tmp_path / "base", {**BASE, "head.weight": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"'head\.weight' is \[2, 2\], and \[3, 2\] in the base"):
        plan(recipe_of(saving(tmp_path), extras="delta", base_model=str(base)))


def test_rows_that_one_input_trained_are_its_own(tmp_path):
    tensors, settings = merged(
        recipe_of(rows(tmp_path, [6, 1], [1, 2]), [3.0, 1.0], extras="average"), tmp_path / "out"
    )
    assert settings["trainable_token_indices"] == {"e": [1, 2, 6]}
    assert tensors[ROWS][:, 0].tolist() == [0.75 * 11 + 0.25 * 21, 22.0, 16.0]


def test_differences_of_rows_are_added_to_those_of_the_base(tmp_path):
    table = torch.arange(16.0).reshape(8, 2)
    base = write_model(tmp_path / "base", {"e.weight": table})
    recipe = recipe_of(rows(tmp_path, [1], [1, 2]), extras="delta", base_model=str(base))
    tensors, _ = merged(recipe | {"merge_method": "task_arithmetic"}, tmp_path / "out")
    expected = torch.stack([torch.tensor([11.0, 11.0]) + 21 - table[1], torch.tensor([22.0, 22.0])])
    assert torch.allclose(tensors[ROWS], expected)


def test_rows_beyond_the_base_are_refused(tmp_path):
    base = write_model(tmp_path / "base", {"e.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"rows 2 of 'e\.weight' are beyond the base's \[2, 2\]"):
        plan(recipe_of(rows(tmp_path, [1, 2]), extras="delta", base_model=str(base)))


def test_other_rows_are_refused_in_a_model(tmp_path):
    base = write_model(tmp_path / "base", {"e.weight": torch.ones(9, 2)})
    recipe = recipe_of(rows(tmp_path, [1], [1, 2]), extras="average", base_model=str(base), output={"kind": "model"})
    with pytest.raises(IncompatibleInputsError, match=r"'in1' and 'in2' trained other rows of 'e\.weight'"):
        plan(recipe)


def test_what_is_saved_in_one_and_factored_in_another_is_refused(tmp_path):
    first = adapter(tmp_path / "in1", {f"{P}head.weight": torch.ones(5, 3)}, modules_to_save=["head"])
    second = write_adapter(tmp_path / "in2", state_dict([*MODULES, "head"]), config())
    expected = "module 'head' is saved whole in 'in1' and has low-rank factors in 'in2'; no adapter holds both"
    with pytest.raises(IncompatibleInputsError, match=expected):
        plan(recipe_of([first, second], extras="average"))


def test_a_bias_beside_factors_goes_under_the_name_that_peft_loads(tmp_path):
    paths = [
        adapter(tmp_path / "in1", {f"{P}layers.0.q.base_layer.bias": torch.ones(5)}, bias="lora_only"),
        adapter(tmp_path / "in2", {f"{P}layers.0.q.bias": torch.full((5,), 3.0)}, bias="all"),
    ]
    tensors, settings = merged(recipe_of(paths, extras="average"), tmp_path / "out")
    assert torch.equal(tensors[f"{P}layers.0.q.base_layer.bias"], torch.full((5,), 2.0))
    assert f"{P}layers.0.q.bias" not in tensors
    assert settings["bias"] == "lora_only"


def test_whole_tensors_keep_their_types(tmp_path):
    tensors, _ = merged(
        recipe_of(saving(tmp_path, [FIRST.bfloat16(), SECOND.bfloat16()]), extras="average"), tmp_path / "out"
    )
    assert tensors[HEAD].dtype == torch.bfloat16
    assert {own.dtype for key, own in tensors.items() if "lora" in key} == {torch.float32}


def test_whole_tensors_of_two_types_are_of_the_wider_one(tmp_path):
    tensors, _ = merged(recipe_of(saving(tmp_path, [FIRST.half(), SECOND]), extras="average"), tmp_path / "out")
    assert tensors[HEAD].dtype == torch.float32


def test_out_dtype_is_that_of_whole_tensors_too(tmp_path):
    tensors, _ = merged(recipe_of(saving(tmp_path), extras="average", out_dtype="bfloat16"), tmp_path / "out")
    assert {own.dtype for own in tensors.values()} == {torch.bfloat16}


def test_values_beyond_the_type_are_refused(tmp_path):
    recipe = recipe_of(saving(tmp_path, [FIRST * 1e5, SECOND]), extras="average", out_dtype="float16")
    with pytest.raises(OutputError, match=r"module '\w.*': the merged values exceed the range of float16"):
        merge(recipe, tmp_path / "out")


def test_a_bias_of_lora_b_that_one_input_lacks_is_the_other_s_by_weight(tmp_path):
    bias = torch.arange(1.0, 6.0)
    first = adapter(tmp_path / "in1", {f"{P}layers.0.q.lora_B.bias": bias}, lora_bias=True)
    recipe = recipe_of([first, adapter(tmp_path / "in2", {})], [0.5, 1.0]) | {"merge_method": "task_arithmetic"}
    tensors, settings = merged(recipe, tmp_path / "out")
    assert settings["lora_bias"] is True
    assert torch.allclose(tensors[f"{P}layers.0.q.lora_B.bias"], 0.5 * 2.0 * bias)  # weight times alpha / r
    for module in MODULES[1:]:  # peft looks for one in every module
        assert torch.equal(tensors[f"{P}{module}.lora_B.bias"], torch.zeros(5))
    assert all(torch.equal(merge(recipe).state_dict[key], tensor) for key, tensor in tensors.items())


HOLDS_EXTRAS = ("biases", "modules_to_save", "token_rows")


def variant_recipe(root, name, **keys):
    """Two adapters of a kind, the second with all its tensors halved."""
    tensors, settings = variants()[name]
    paths = [write_adapter(root / f"in{n}", {key: own / n for key, own in tensors.items()}, settings) for n in (1, 2)]
    extras = {"extras": "average"} if name in HOLDS_EXTRAS else {}
    return recipe_of(paths, [0.7, 0.3], output={"rank": "max"}, **extras, **keys) | {"merge_method": "task_arithmetic"}


@pytest.mark.parametrize("name", variants())
def test_in_memory_it_is_the_same_as_on_disk(tmp_path, name):
    recipe = variant_recipe(tmp_path, name)
    tensors, settings = merged(recipe, tmp_path / "out")
    in_memory = merge(recipe)
    assert in_memory.state_dict.keys() == tensors.keys()
    assert all(torch.equal(in_memory.state_dict[key], tensor) for key, tensor in tensors.items())
    assert in_memory.config == settings


@pytest.mark.parametrize("name", variants())
def test_merged_with_weights_that_sum_to_one_it_is_read_again(tmp_path, name):
    recipe = variant_recipe(tmp_path, name, dtype="float64")
    found = merge(recipe).open(label="merged")
    halves = 0.7 + 0.3 / 2  # of what is linear in a tensor; factors are halved twice
    first = merge(recipe | {"models": recipe["models"][:1]}).open(label="first")
    assert found.modules.keys() == first.modules.keys()
    for module in found.modules:
        is_bias = found.modules[module].is_dense
        expected = (halves if is_bias else 0.7 + 0.3 / 4) / 0.7 * first.read(module).rows(slice(None))
        assert torch.allclose(found.read(module).rows(slice(None)), expected, rtol=1e-5, atol=1e-6)
    for extra in found.extras:
        own = first.read_extra(extra, slice(None)).double()
        assert torch.allclose(found.read_extra(extra, slice(None)).double(), halves * own, rtol=1e-2)


@pytest.mark.parametrize("name", ["experts", "token_rows", "modules_to_save"])
def test_cut_off_it_goes_on_to_the_same_bytes(tmp_path, name):
    recipe, out = variant_recipe(tmp_path, name), tmp_path / "out"
    expected = tmp_path / "whole"
    whole = followed(recipe, expected)
    cut_off(recipe, out, 2)
    assert followed(recipe, out).merged == whole.merged - 2
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((out / own).read_bytes() == (expected / own).read_bytes() for own in names)
    assert files(out).keys() == files(expected).keys()


@pytest.mark.parametrize("name", ["experts", "token_rows", "lora_bias"])
def test_made_in_parts_it_is_the_same_to_the_byte(tmp_path, name):
    recipe = variant_recipe(tmp_path, name)
    merge(recipe, tmp_path / "whole")
    for index in range(2):
        merge(recipe, tmp_path / "parts", shard=(index, 2))
    finalize(tmp_path / "parts")
    own = "adapter_model.safetensors"
    assert (tmp_path / "parts" / own).read_bytes() == (tmp_path / "whole" / own).read_bytes()


@pytest.mark.parametrize("name", [pytest.param("experts", marks=pytest.mark.exhaustive), "modules_to_save"])
def test_processes_make_the_same_bytes(tmp_path, name):
    recipe = variant_recipe(tmp_path, name)
    merge(recipe, tmp_path / "threads")
    merge(recipe, tmp_path / "processes", executor="processes", workers=2)
    own = "adapter_model.safetensors"
    assert (tmp_path / "processes" / own).read_bytes() == (tmp_path / "threads" / own).read_bytes()


def test_experts_of_own_ranks_share_the_largest(tmp_path):
    recipe = variant_recipe(tmp_path, "experts") | {"output": {"rank": {"error": 0.3}, "uniform_rank": False}}
    adapter = merge(recipe).open(label="merged")
    assert len({own.rank for name, own in adapter.modules.items() if name.startswith("mlp")}) == 1


def test_of_a_fine_tune_that_becomes_an_adapter_changed_norms_lie_beside_the_factors(tmp_path):
    base = weights()
    del base["model.layers.0.conv.weight"]
    changed = {
        "model.layers.0.attn.q_proj.weight": base["model.layers.0.attn.q_proj.weight"] + 1,
        "model.norm.weight": base["model.norm.weight"] + 1,
    }
    model = write_model(tmp_path / "base", base)
    tuned = write_model(tmp_path / "tuned", {**base, **changed})
    recipe = recipe_of([tuned], base_model=str(model), output={"rank": 1}) | {"merge_method": "task_arithmetic"}
    with pytest.raises(CheckpointError, match=r"'tuned' holds a tensor that is no low-rank factor: '.*norm\.weight'"):
        plan(recipe)
    tensors, settings = merged(recipe | {"extras": "average"}, tmp_path / "out")
    assert torch.allclose(tensors[f"{P}model.norm.weight"], changed["model.norm.weight"])
    assert settings["modules_to_save"] == ["model.norm"]
    read = merge(recipe | {"extras": "average"}).open(label="merged").read("model.layers.0.attn.q_proj")
    assert torch.allclose(densify(read), torch.ones(6, 4), atol=1e-5)


def test_inputs_without_any_factors_make_no_adapter(tmp_path):
    paths = saving(tmp_path)
    for path in paths:
        file = path / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if "lora_" not in key}, file)
    with pytest.raises(IncompatibleInputsError, match=r"no module of 'in1', 'in2' has low-rank factors.*kind: model"):
        plan(recipe_of(paths, extras="average"))
