"""Every bad input ends with status 2, one readable error, and nothing left behind."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch

from .builders import MODULES, run, tensors, tree, write_adapter, write_config, write_recipe

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def refused(tmp_path):
    """Merging is refused with these texts, and the directory is as it was."""

    def check(*arguments: object, texts: tuple[str, ...]) -> None:
        before = tree(tmp_path)
        result = run("merge", *arguments, "-o", "out")
        assert result.exit_code == 2, result.output
        assert "error: " in result.stderr
        assert "Traceback" not in result.output
        assert result.stdout == ""
        for text in texts:
            assert text in result.stderr
        assert tree(tmp_path) == before

    return check


def test_a_recipe_that_is_not_yaml(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("models: [a, {b\n")
    refused("recipe.yaml", texts=("recipe.yaml:2:1: not valid YAML",))


def test_a_recipe_that_is_a_list(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("- a\n")
    refused("recipe.yaml", texts=("expected a mapping",))


def test_a_recipe_that_is_not_there(refused):
    refused("nothing.yaml", texts=("nothing.yaml: there is no such file",))


def test_a_yaml_bomb(refused, tmp_path):
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(["l0: &l0 [x, x]", *levels]))
    refused("recipe.yaml", texts=("expands to more than 100,000",))


def test_an_unknown_key_with_its_place_and_the_nearest_name(refused, recipe):
    recipe.write_text(recipe.read_text() + "parameter: {density: 0.5}\n")
    refused(recipe, texts=("recipe.yaml:5:1", "'parameter'", "did you mean 'parameters'?"))


def test_an_unknown_method(refused, math):
    refused("--method", "tie", "math", texts=("unknown merge_method 'tie'; did you mean 'ties'?",))


def test_an_unknown_parameter(refused, recipe):
    refused(recipe, "--set", "parameters.densty=0.5", texts=("no parameter 'densty'; did you mean 'density'?",))


def test_an_override_that_is_none(refused, recipe):
    refused(recipe, "--set", "density", texts=("--set density: expected path=value",))


def test_a_model_that_is_not_there(refused, tmp_path, math):
    write_recipe(tmp_path / "recipe.yaml", "math", "./cod")
    refused("recipe.yaml", texts=("recipe.yaml:4:10", "there is no", "cod"))


def test_several_problems_together(refused, tmp_path):
    write_recipe(tmp_path / "recipe.yaml", "./one", "./two")
    refused("recipe.yaml", texts=("2 problems:\n1. ", "one", "\n2. ", "two"))


def test_very_many_problems_are_shortened(refused, recipe):
    recipe.write_text(recipe.read_text() + "".join(f"key{n}: 1\n" for n in range(30)))
    refused(recipe, texts=("30 problems:\n1. ", "\n20. ", "\n... and 10 more"))


def test_an_adapter_for_another_base(refused, recipe, code):
    write_adapter(code, tensors(d_out=7))
    texts = ("module 'layers.0.q_proj': 'math' has d_out=6, d_in=5, 'code' has d_out=7, d_in=5", "same base model")
    refused(recipe, texts=texts)


def test_no_module_in_common(refused, recipe, code):
    write_adapter(code, tensors([f"model.{name}" for name in MODULES]))
    refused(recipe, texts=("'code' shares no module with the other inputs", "model.layers.0.q_proj"))


def test_truncated_tensors(refused, recipe, code):
    file = code / TENSORS
    file.write_bytes(file.read_bytes()[:-8])
    refused(recipe, texts=(TENSORS,))


@pytest.mark.parametrize("content", [b"", b"\0", b"not a tensor file at all", b"\xff" * 64])
def test_corrupt_tensors(refused, recipe, code, content):
    (code / TENSORS).write_bytes(content)
    refused(recipe, texts=(TENSORS,))


def test_a_header_that_lies_about_offsets(refused, recipe, code):
    file = code / TENSORS
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = list(header)[:2]
    header[second]["data_offsets"] = [0, *header[second]["data_offsets"][1:]]
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    assert first != second
    refused(recipe, texts=(TENSORS,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(refused, recipe, code, value):
    broken = tensors(seed=2)
    broken["base_model.model.layers.1.v_proj.lora_A.weight"][1, 2] = value
    write_adapter(code, broken)
    refused(recipe, texts=("'base_model.model.layers.1.v_proj.lora_A.weight' holds 1 NaN or infinite",))


class Runs:
    """What a hostile pickle holds: a call."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __reduce__(self):
        return open, (self._marker, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not_run_it(refused, recipe, tmp_path, code, zipped):
    (code / TENSORS).unlink()
    marker = tmp_path / "code-ran"
    made = {**tensors(seed=2), "base_model.model.layers.9.q_proj.lora_A.weight": Runs(str(marker))}
    torch.save(made, code / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    refused(recipe, texts=("adapter_model.bin",))
    assert not marker.exists()


def test_a_bare_pickle_that_runs_code_does_not_run_it(refused, recipe, tmp_path, code):
    (code / TENSORS).unlink()
    marker = tmp_path / "code-ran"
    (code / "adapter_model.bin").write_bytes(pickle.dumps(Runs(str(marker))))
    refused(recipe, texts=("adapter_model.bin",))
    assert not marker.exists()


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite(refused, math, code, weight):
    refused("--method", "ties", "math", "code", "--weights", "1", weight, texts=("models[1].parameters.weight",))


@pytest.mark.parametrize("weight", [".nan", ".inf", "1e999"])
def test_a_weight_in_a_recipe_that_is_not_finite(refused, recipe, weight):
    text = f"--set models[0].parameters.weight={weight}"
    refused(recipe, "--set", f"models[0].parameters.weight={weight}", texts=(text,))


def test_rank_0_asked_for(refused, recipe):
    refused(recipe, "--set", "output.rank=0", texts=("a whole number of at least 1", "found 0"))


def test_rank_0_in_an_adapter(refused, recipe, code):
    write_adapter(code, tensors(rank=0), r=0)
    refused(recipe, texts=("adapter 'code'", "'r'"))


def test_a_rank_that_contradicts_the_tensors(refused, recipe, code):
    write_config(code, r=8)
    refused(recipe, texts=("configuration 8, tensors 2",))


def test_no_models(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("merge_method: ties\nmodels: []\n")
    refused("recipe.yaml", texts=("recipe.yaml:2:9: models: expected a list with at least one entry",))


def test_a_tensor_that_nothing_handles(refused, recipe, code):
    extra = {"base_model.model.lm_head.weight": torch.ones(3, 3)}
    write_adapter(code, {**tensors(seed=2), **extra})
    refused(recipe, texts=("lm_head.weight",))


def test_weights_that_sum_to_zero(refused, math, code):
    refused("--method", "linear", "math", "code", "--weights", "1", "-1", texts=("normalize: false",))


def test_memory_that_is_no_amount(refused, recipe):
    refused(recipe, "--memory", "much", texts=("'much' is not an amount of memory",))


def test_memory_that_is_too_little(refused, recipe):
    texts = ("module 'layers.0.q_proj' needs", "the merge may hold 100 B", " with --memory, take fewer workers")
    refused(recipe, "--memory", "100", texts=texts)


def test_vram_that_is_no_amount(refused, recipe):
    refused(recipe, "--vram", "much", texts=("'much' is not an amount of memory",))


def test_an_unknown_device(refused, recipe):
    refused(recipe, "--device", "abacus", texts=("unknown device 'abacus'",))


def test_an_unknown_executor(refused, recipe):
    refused(recipe, "--executor", "thread", texts=("unknown executor 'thread'; did you mean 'threads'?",))


@pytest.mark.parametrize("output", ["math", "math/merged", "math/deep/er"])
def test_an_output_in_an_input(recipe, tmp_path, output):
    before = tree(tmp_path)
    result = run("merge", recipe, output, "--overwrite")
    assert result.exit_code == 2
    assert "lies in the input 'math'" in result.stderr
    assert tree(tmp_path) == before


def test_an_output_that_holds_an_input(tmp_path, math, code):
    outer = write_adapter(tmp_path / "outer", tensors(seed=3))
    write_adapter(outer / "inner", tensors(seed=4))
    write_recipe(tmp_path / "recipe.yaml", "math", "outer/inner")
    before = tree(tmp_path)
    result = run("merge", "recipe.yaml", "outer", "--overwrite")
    assert result.exit_code == 2
    assert "holds the input 'inner'" in result.stderr
    assert tree(tmp_path) == before


def test_an_output_below_a_file(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    result = run("merge", recipe, "file/out")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert tree(tmp_path) == before
