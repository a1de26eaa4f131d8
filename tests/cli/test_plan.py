from __future__ import annotations

import json

import pytest

from .builders import MODULES, run, succeeds, tensors, tree, write_adapter, write_recipe


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
    assert "at most 1.0 GiB for all modules in flight" in printed


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
