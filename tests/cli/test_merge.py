from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from .builders import run, succeeds, tensors, tree, write_adapter

OUTPUT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "recipe.yaml",
    "report.json",
}


def merged_weights(directory):
    loaded = load_file(directory / "adapter_model.safetensors")
    module = "base_model.model.layers.0.q_proj"
    return loaded[f"{module}.lora_B.weight"] @ loaded[f"{module}.lora_A.weight"]


def source(seed):
    made = tensors(seed=seed)
    module = "base_model.model.layers.0.q_proj"
    return 2 * made[f"{module}.lora_B.weight"] @ made[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("arguments", [("out",), ("-o", "out"), ("--output", "out")])
def test_merge_writes_the_output_and_prints_the_closing_lines(recipe, tmp_path, arguments):
    printed = succeeds("merge", recipe, *arguments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUT_FILES
    assert printed.startswith("Merged 2 adapters with ties: 4 modules, rank 2")
    assert "PeftModel.from_pretrained(base_model, 'out')" in printed


def test_quiet_merge_prints_nothing(recipe, tmp_path):
    result = run("merge", recipe, "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out").is_dir()


def test_a_quiet_merge_still_warns(math):
    result = run("merge", "--method", "linear", "math", "math", "-o", "out", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("warning: 'math#1' is given 2 times")


def test_quiet_and_debug_may_stand_before_the_command(recipe):
    assert succeeds("--quiet", "--debug", "merge", recipe, "out") == ""


def test_weights_without_a_recipe_are_used_in_order(math, code, tmp_path):
    options = ("--set", "parameters.normalize=false", "--set", "output.rank=sum")
    succeeds("merge", "--method", "linear", "math", "code", "--weights", "0.6", "-0.4", "-o", "out", *options)
    torch.testing.assert_close(merged_weights(tmp_path / "out"), 0.6 * source(1) - 0.4 * source(2))


def test_models_may_follow_the_weights(math, code, tmp_path):
    succeeds("merge", "--weights=1", "3", "--method", "linear", "-o", "out", "math", "code", "--set", "output.rank=sum")
    torch.testing.assert_close(merged_weights(tmp_path / "out"), (source(1) + 3 * source(2)) / 4)


def test_weights_default_to_one(math, code, tmp_path):
    succeeds("merge", "--method", "linear", "math", "code", "-o", "out", "--set", "output.rank=sum")
    torch.testing.assert_close(merged_weights(tmp_path / "out"), (source(1) + source(2)) / 2)


def test_no_hash_leaves_the_inputs_out_of_the_manifest(recipe, tmp_path):
    succeeds("merge", recipe, "out", "--no-hash")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {file["sha256"] for source in manifest["sources"] for file in source["files"]} == {None}


@pytest.mark.parametrize("executor", ["threads", "serial"])
def test_the_executor_does_not_change_the_result(recipe, tmp_path, executor):
    succeeds("merge", recipe, "reference")
    succeeds("merge", recipe, "out", "--executor", executor, "--memory", "64MiB", "--device", "cpu")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_an_existing_output_is_left_alone_without_overwrite(recipe, tmp_path):
    succeeds("merge", recipe, "out")
    before = tree(tmp_path)
    result = run("merge", recipe, "out", "--set", "scale=0.5")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: out: exists already. Choose another path, or allow it to be overwritten (--overwrite).\n"
    )
    assert tree(tmp_path) == before


def test_overwrite_replaces_the_output(recipe, tmp_path):
    succeeds("merge", recipe, "out")
    before = merged_weights(tmp_path / "out")
    succeeds("merge", recipe, "out", "--set", "scale=0.5", "--overwrite")
    torch.testing.assert_close(merged_weights(tmp_path / "out"), before / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"math", "code", "recipe.yaml", "out"}


def test_a_merge_that_fails_with_overwrite_leaves_the_old_output(recipe, tmp_path, code):
    succeeds("merge", recipe, "out")
    broken = tensors(seed=2)
    broken["base_model.model.layers.1.v_proj.lora_B.weight"][0, 0] = float("inf")
    write_adapter(code, broken)
    before = tree(tmp_path)
    assert run("merge", recipe, "out", "--overwrite").exit_code == 2
    assert tree(tmp_path) == before


def test_what_is_not_an_adapter_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("five years of work")
    result = run("merge", recipe, "out", "--overwrite")
    assert result.exit_code == 2
    assert "holds 'thesis.tex', which no merge writes, and is not overwritten" in result.stderr
    assert (tmp_path / "out/thesis.tex").read_text() == "five years of work"


def test_the_same_adapter_twice_is_allowed_and_reported(math, tmp_path):
    printed = succeeds("merge", "--method", "linear", "math", "math", "-o", "out")
    assert "'math#1' is given 2 times" in printed
    torch.testing.assert_close(merged_weights(tmp_path / "out"), source(1))


def test_strict_makes_a_warning_an_error(math, tmp_path):
    before = tree(tmp_path)
    result = run("merge", "--method", "linear", "math", "math", "-o", "out", "--strict")
    assert result.exit_code == 2
    assert "'math#1' is given 2 times" in result.stderr
    assert "warnings are errors under --strict" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "name a recipe and an output"),
        (("recipe.yaml",), "there is no output; add -o OUT"),
        (("math", "code", "-o", "out"), "'math' is a directory; to merge adapters without a recipe, add --method"),
        (("math", "out"), "'math' is a directory"),
        (("recipe.yaml", "b.yaml", "-o", "out"), "a recipe is one file"),
        (("recipe.yaml", "out", "--weights", "1", "2"), "--weights goes with --method"),
        (("--method", "ties", "-o", "out"), "--method goes with models"),
        (("--method", "ties", "math", "code"), "there is no output; add -o OUT"),
        (("--method", "ties", "recipe.yaml", "-o", "out"), "try --set merge_method=ties"),
        (
            ("--method", "ties", "math", "code", "--weights", "1", "-o", "out"),
            "--weights: 1 given for 2 models; give one for each",
        ),
        (("--method", "ties", "math", "code", "-o", "out", "--weights"), "'--weights' requires an argument"),
        (("--method", "ties", "math", "code", "-o", "out", "--weights", "many"), "'many' is not a valid float"),
    ],
)
def test_arguments_that_do_not_go_together_are_usage_errors(recipe, tmp_path, arguments, text):
    before = tree(tmp_path)
    result = run("merge", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert tree(tmp_path) == before
