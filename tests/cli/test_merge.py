from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import merge
from mergekit_lowrank.cli import merging

from .builders import run, succeeds, tensors, tree, write_adapter

OUTPUT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "recipe.yaml",
    "report.html",
    "report.json",
    "timings.json",
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


@pytest.mark.parametrize("executor", ["threads", "serial", "processes"])
def test_the_executor_does_not_change_the_result(recipe, tmp_path, executor):
    succeeds("merge", recipe, "reference")
    succeeds("merge", recipe, "out", "--executor", executor, "--memory", "256MiB", "--device", "cpu", "--workers", 2)
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
        (
            ("recipe.yaml", "out", "--shard", "1"),
            "Invalid value for '--shard': '1' is no part; expected I/N, as in 0/8 for the first of eight",
        ),
        (("recipe.yaml", "out", "--shard", "-1/2"), "'-1/2' is no part; expected I/N"),
        (("recipe.yaml", "out", "--shard", "2/2"), "'2/2': parts are counted from 0, so the last of 2 is 1/2"),
        (("recipe.yaml", "out", "--shard", "0/0"), "'0/0': there are 0"),
        (("recipe.yaml", "out", "--workers", "0"), "Invalid value for '--workers': 0 is not in the range x>=1"),
    ],
)
def test_arguments_that_do_not_go_together_are_usage_errors(recipe, tmp_path, arguments, text):
    before = tree(tmp_path)
    result = run("merge", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert tree(tmp_path) == before


@pytest.fixture
def asked(monkeypatch):
    """What ``merge`` is asked for; nothing is merged but in memory."""
    seen = {}

    def recorded(recipe, output, **options):
        seen.update(options, output=str(output))
        return merge(recipe).report

    monkeypatch.setattr(merging, "merge", recorded)
    return seen


def test_options_that_are_not_given_are_left_to_the_recipe(recipe, asked):
    succeeds("merge", recipe, "out", "--quiet")
    assert asked == {
        "output": "out",
        "memory_bytes": None,
        "vram_bytes": None,
        "device": None,
        "executor": None,
        "workers": None,
        "overwrite": False,
        "resume": True,
        "shard": None,
        "hash_sources": True,
        "strict": False,
        "verify": False,
        "reporters": [],
    }


def test_options_reach_the_merge(recipe, asked):
    options = ("--memory", "2GiB", "--vram", "6GB", "--device", "cuda:1", "--executor", "processes", "--workers", "3")
    succeeds("merge", recipe, "out", *options, "--no-resume", "--shard", "1/8", "--no-hash", "--overwrite", "--strict")
    assert asked | {"reporters": []} == {
        "output": "out",
        "memory_bytes": 2 << 30,
        "vram_bytes": 6 * 10**9,
        "device": "cuda:1",
        "executor": "processes",
        "workers": 3,
        "overwrite": True,
        "resume": False,
        "shard": (1, 8),
        "hash_sources": False,
        "strict": True,
        "verify": False,
        "reporters": [],
    }


def test_a_part_says_what_comes_next(recipe, asked):
    first, second = succeeds("merge", recipe, "my out", "--shard", "0/8").splitlines()
    assert first.startswith("Merged part 0/8 of my out: 4 modules in ")
    assert second == "  next  mergekit-lowrank finalize 'my out', once all 8 parts are merged"
    assert succeeds("merge", recipe, "out", "--shard", "0/1").endswith("finalize out, now\n")


def test_parts_that_are_finalized_are_the_merge(recipe, tmp_path):
    succeeds("merge", recipe, "whole")
    for part in ("1/2", "0/2"):
        assert succeeds("merge", recipe, "out", "--shard", part).startswith(f"Merged part {part} of out: 2 modules in ")
        assert not (tmp_path / "out").exists()
    printed = succeeds("finalize", "out")
    assert printed.startswith("Merged 2 adapters with ties: 4 modules, rank 2")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_there_is_nothing_to_finalize(tmp_path):
    before = tree(tmp_path)
    result = run("finalize", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: out: ")
    assert tree(tmp_path) == before


def test_a_sweep_prints_a_line_for_each_variant(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "sweep: {scale: [1, 0.5]}\n")
    first, heads, *rows = succeeds("merge", recipe, "out").splitlines()
    assert first.startswith("Merged 2 inputs into 2 variants, each in its directory in out, in ")
    assert heads.split() == ["variant", "method", "modules", "rank", "size", "norm", "cut", "error"]
    cells = [row.split() for row in rows]
    assert [row[:7] for row in cells] == [
        [name, "ties", "4", "rank", "2", "352", "B"] for name in ("scale=1", "scale=0.5")
    ]
    assert float(cells[0][7]) == pytest.approx(2 * float(cells[1][7]), rel=0.01)
    assert cells[0][8] == cells[1][8]
    torch.testing.assert_close(merged_weights(tmp_path / "out/scale=1"), 2 * merged_weights(tmp_path / "out/scale=0.5"))


def test_a_sweep_warns_once(math, tmp_path):
    options = ("--method", "linear", "math", "math", "--set", "sweep={scale: [1, 0.5]}")
    printed = succeeds("merge", *options, "-o", "out")
    assert printed.count("  warning  'math#1' is given 2 times") == 1
    assert run("merge", *options, "-o", "out", "--quiet", "--overwrite").stderr.count("warning: ") == 1


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("command", ["merge", "finalize"])
def test_a_signal_ends_a_merge_and_says_what_is_left(
    recipe, tmp_path, monkeypatch, number, status, word, is_kept, command
):
    def stopped(*_, **__):
        if is_kept:
            (tmp_path / ".out.partial").mkdir()
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(merging, command, stopped)
    before = signal.getsignal(signal.SIGTERM)
    result = run(*(["merge", recipe, "out"] if command == "merge" else ["finalize", "out"]))
    assert (result.exit_code, result.stdout) == (status, "")
    kept = "the work so far is kept; run the same command again to go on"
    assert result.stderr.strip() == f"{word}: {kept if is_kept else 'nothing was written'}"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_tidying_up_is_not_stopped_by_a_second_signal(recipe, monkeypatch):
    tidied = []

    def stopped(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)

    monkeypatch.setattr(merging, "merge", stopped)
    assert run("merge", recipe, "out").exit_code == 143
    assert tidied == [True]
