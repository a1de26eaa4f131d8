from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from mergekit_lowrank.cli import planning

from .builders import MODULES, run, succeeds, tensors, tree, write_adapter, write_model, write_recipe


def test_plan_shows_layers_that_are_alike_in_one_line(recipe):
    printed = succeeds("plan", recipe).splitlines()
    assert printed[0].split("  ")[0] == "modules"
    assert printed[1].split() == [
        "layers.{0-1}.q_proj", "2", "6", "x", "5", "all", "2", "2", "ties", "delta", "2", *printed[1].split()[-2:],
    ]  # fmt: skip
    assert [line.split()[0] for line in printed[1:3]] == ["layers.{0-1}.q_proj", "layers.{0-1}.v_proj"]


def test_plan_all_shows_every_module(recipe):
    printed = succeeds("plan", recipe, "--all").splitlines()
    assert [line.split()[0] for line in printed[1:5]] == list(MODULES)


def test_plan_shows_totals_and_the_budget(recipe):
    printed = succeeds("plan", recipe, "--memory", "1GiB")
    assert "inputs   2, base model org/base" in printed
    assert "reads    704 B of tensors" in printed
    assert "writes   352 B of tensors, every module padded to rank 2" in printed
    assert re.search(r"^memory   [\d.]+ \wiB for the largest module, [\d.]+ \wiB beside the modules; ", printed, re.M)
    assert "; at most 1.0 GiB in all (--memory)\n" in printed


def test_plan_keeps_apart_what_differs(tmp_path, math, code):
    write_adapter(code, tensors(MODULES[:3], rank=3, seed=2), r=3)
    write_recipe(tmp_path / "recipe.yaml", "math", "code", method="linear")
    printed = succeeds("plan", "recipe.yaml", "--set", "rules=[{match: layers.0.q, rank: 1}]")
    rows = [line.split("  ") for line in printed.splitlines()[1:5]]
    assert [row[0] for row in rows] == list(MODULES)
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert [row[3:5] + row[7:8] for row in cells] == [
        ["all 2", "2/3", "1"],
        ["all 2", "2/3", "3"],
        ["all 2", "2/3", "3"],
        ["math", "2", "3"],
    ]
    assert "warning  'code' lacks 1 of 4 modules (layers.1.v_proj)" in printed


@pytest.mark.parametrize("policy", ["energy", "error"])
def test_plan_names_a_rank_that_depends_on_the_data(recipe, policy):
    printed = succeeds("plan", recipe, "--set", f"output.rank={{{policy}: 0.9}}")
    assert f"by {policy}" in printed
    assert "writes   known once the ranks are\n" in printed


def test_plan_shows_what_a_budget_may_take_and_costs(recipe):
    printed = succeeds("plan", recipe, "--set", "output={rank: {budget: 200kB}, uniform_rank: false}")
    assert "by budget" in printed
    assert "writes   at most 195.3 KiB of tensors, spread over the modules; each is merged twice" in printed


def test_plan_shows_snapped_ranks(recipe):
    printed = succeeds("plan", recipe, "--set", "output={rank: 2, snap: vllm}")
    assert "every module padded to rank 8" in printed
    printed = succeeds("plan", recipe, "--set", "output={rank: {energy: 0.9}, snap: [2, 4, 5]}")
    assert "writes   known once the ranks are; each is raised to the next of 2, 4, 5" in printed


def test_plan_refuses_what_a_budget_cannot_hold_and_a_rank_that_is_not_accepted(recipe):
    for output, message in (
        ("{rank: {budget: 100}, uniform_rank: false}", "100 bytes are too few: rank 1 in every module"),
        ("{rank: sum, snap: [2]}", "has rank 4, and the largest accepted rank is 2"),
        ("{rank: {budget: 100}}", "add uniform_rank: false"),
    ):
        result = run("plan", recipe, "--set", f"output={output}")
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_plan_takes_a_method_instead_of_a_recipe(math, code):
    printed = succeeds("plan", "--method", "drm", "math", "code", "--weights", "1", "-2", "--json")
    planned = json.loads(printed)
    assert planned["modules"][0]["weights"] == [1, -2]
    assert planned["modules"][0]["method"] == "drm"


def test_plan_json_is_the_plan(recipe):
    planned = json.loads(succeeds("plan", recipe, "--json"))
    assert [module["module"] for module in planned["modules"]] == list(MODULES)
    assert planned["totals"]["bytes_read"] == 704


def test_plan_reads_no_tensor_and_writes_nothing(recipe, tmp_path, code):
    broken = tensors(seed=2)
    broken["base_model.model.layers.1.v_proj.lora_A.weight"][1, 2] = float("nan")
    write_adapter(code, broken)
    before = tree(tmp_path)
    succeeds("plan", recipe)
    assert tree(tmp_path) == before


def test_plan_fails_on_what_the_merge_would_fail_on(recipe, code):
    write_adapter(code, tensors(d_in=9))
    result = run("plan", recipe)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "All inputs must come from the same base model" in result.stderr


def test_plan_strict_refuses_warnings(recipe, code):
    write_adapter(code, tensors(), base_model_name_or_path="org/other")
    assert "name different base models" in succeeds("plan", recipe)
    assert run("plan", recipe, "--strict").exit_code == 2


def test_the_recipe_may_set_the_budget_and_the_option_wins(recipe):
    recipe.write_text(recipe.read_text() + "execution: {memory: 3GiB}\n")
    assert "at most 3.0 GiB in all" in succeeds("plan", recipe)
    assert "at most 1.0 GiB in all" in succeeds("plan", recipe, "--memory", "1GiB")


def test_workers_take_memory_of_their_own(recipe):
    beside = [
        re.search(r"([\d.]+) MiB beside the modules", succeeds("plan", recipe, "--workers", count))[1]
        for count in (1, 3)
    ]
    assert float(beside[1]) > float(beside[0])


def test_plan_says_what_goes_through_a_file_on_disk(recipe, monkeypatch):
    assert "on disk" not in succeeds("plan", recipe)
    plan = planning.plan_variants

    def squeezed(*arguments, **options):
        made = plan(*arguments, **options)[""]
        return {"": replace(made, modules=(replace(made.modules[0], scratch_bytes=3 << 20), *made.modules[1:]))}

    monkeypatch.setattr(planning, "plan_variants", squeezed)
    printed = succeeds("plan", recipe).splitlines()
    assert printed[0].endswith("  on disk")
    assert [line.split()[0] for line in printed if line.endswith("3.0 MiB")] == ["layers.0.q_proj", "disk"]
    assert "disk     1 of 4 modules go through a file on disk, of up to 3.0 MiB" in printed


@pytest.fixture
def sweep(recipe):
    recipe.write_text(recipe.read_text() + "sweep: {parameters.density: [0.2, 0.5], space: [delta, joint]}\n")
    return recipe


def test_plan_shows_the_variants_of_a_sweep(sweep):
    printed = succeeds("plan", sweep).splitlines()
    assert [line.split()[:4] for line in printed[:5]] == [
        ["variant", "method", "space", "rank"],
        ["density=0.2,space=delta", "ties", "delta", "2"],
        ["density=0.2,space=joint", "ties", "joint", "2"],
        ["density=0.5,space=delta", "ties", "delta", "2"],
        ["density=0.5,space=joint", "ties", "joint", "2"],
    ]
    assert "352 B of tensors, every module padded to rank 2" in printed[1]
    assert "variants  4, each written into a directory of its name; inputs are read once for all" in printed


def test_plan_all_shows_the_modules_of_every_variant(sweep):
    printed = succeeds("plan", sweep, "--all")
    assert len(re.findall(r"^density=0.\d,space=\w+:$", printed, re.MULTILINE)) == 4
    assert printed.count("layers.1.v_proj") == 4


def test_plan_json_of_a_sweep_holds_a_plan_for_each_variant(sweep):
    planned = json.loads(succeeds("plan", sweep, "--json"))
    assert next(iter(planned["variants"])) == "density=0.2,space=delta"
    spaces = [made["modules"][0]["space"] for made in planned["variants"].values()]
    assert spaces == ["delta", "joint", "delta", "joint"]


def test_plan_names_what_is_wrong_with_a_variant_where_it_is_swept_and_once(recipe):
    recipe.write_text(
        recipe.read_text() + "sweep:\n  parameters.density: [0.2, 7]\n  space: [delta, jiont]\n  seed: [1, 2]\n"
    )
    result = run("plan", recipe)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: 2 problems:\n1. ")
    assert f"{recipe}:7:18: space: unknown space 'jiont'; did you mean 'joint'?" in result.stderr
    assert f"{recipe}:6:29: parameters.density: expected less than or equal to 1, found 7" in result.stderr


def test_plan_warns_once_of_what_all_variants_share(sweep, code):
    write_adapter(code, tensors(MODULES[:3], seed=2))
    assert succeeds("plan", sweep).count("warning") == 1


def test_plan_of_a_fold_shows_what_is_read_and_written_of_the_base(recipe, tmp_path):
    write_model(tmp_path / "base")
    options = ("--set", "base_model=base", "--set", "output={kind: model, shard_size: 250}")
    printed = succeeds("plan", recipe, *options)
    assert printed.splitlines()[1].split()[-4:-2] == ["delta", "whole"]
    assert "inputs   2, base model base\n" in printed
    assert "reads    704 B of tensors, and the base model: 560 B\n" in printed
    assert re.search(r"^writes   [\d.]+ \w+ in 3 files, 4 of 5 tensors changed$", printed, re.MULTILINE)
    planned = json.loads(succeeds("plan", recipe, *options, "--json"))
    assert planned["kind"] == "model"
    assert planned["totals"]["bytes_written"] >= 560  # headers of files are beside the tensors


def test_plan_of_a_fold_needs_the_base(recipe):
    result = run("plan", recipe, "--set", "base_model=./base", "--set", "output.kind=model")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --set base_model=./base: './base': there is no ")
