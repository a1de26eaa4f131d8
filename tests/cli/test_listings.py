"""``strategies``, ``plugins``, ``schema`` and ``completion``."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from mergekit_lowrank import __version__
from mergekit_lowrank.recipe import recipe_schema

from .builders import run, succeeds


def described(name):
    (method,) = json.loads(succeeds("strategies", name, "--json"))
    return method, {parameter["name"]: parameter for parameter in method["parameters"]}


def test_strategies_lists_every_method_with_its_default_space_first():
    printed = succeeds("strategies").splitlines()
    names = [line.split()[0] for line in printed[:-2] if not line.startswith(" ")]
    assert names == sorted(names)
    assert {"drm", "knots", "linear", "robustmerge", "ties"} <= set(names)
    assert any(line.strip().startswith("in delta, joint, core, factors; TIES-Merging") for line in printed)


def test_strategies_json_is_a_list_of_objects():
    methods = json.loads(succeeds("strategies", "--json"))
    assert {method["name"] for method in methods} >= {"drm", "linear", "robustmerge", "ties"}
    for method in methods:
        assert {"name", "summary", "paper", "spaces", "parameters", "preset_of", "is_random", "is_order_free"} == set(
            method
        )
        for parameter in method["parameters"]:
            assert {"name", "type", "default", "description", "belongs_to", "per_input"} <= set(parameter)


def test_a_parameter_has_its_bounds_default_and_owner():
    _, parameters = described("ties")
    assert parameters["density"]["minimum"] == 0
    assert parameters["density"]["maximum"] == 1
    assert (parameters["density"]["belongs_to"], parameters["density"]["per_input"]) == ("strategy", True)
    assert parameters["scope"]["choices"] == ["tensor", "model"]
    assert (parameters["direction"]["belongs_to"], parameters["direction"]["space"]) == ("space", "joint")


def test_defaults_are_those_of_the_method():
    _, of_drm = described("drm")
    _, of_ties = described("ties")
    assert of_drm["rank_tolerance"]["default"] != of_ties["rank_tolerance"]["default"]


def test_a_preset_shows_what_it_fixes():
    knots, parameters = described("knots")
    assert (knots["preset_of"], knots["spaces"]) == ("ties", ["joint"])
    assert parameters["scope"]["default"] == "model"
    assert described("ties")[0]["preset_of"] is None


def test_strategies_name_shows_the_parameter_table():
    printed = succeeds("strategies", "knots")
    assert printed.startswith("knots: ")
    assert "preset of  ties" in printed
    row = next(line for line in printed.splitlines() if line.startswith("density"))
    assert row.split("  ")[0] == "density"
    assert "number, >= 0, <= 1" in row
    assert row.endswith("may be given for one model")


def test_an_unknown_strategy_is_met_with_the_nearest():
    result = run("strategies", "tis")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown merge_method 'tis'; did you mean 'ties'?")
    assert "Known: core_ties, drm," in result.stderr


def test_plugins_shows_the_built_ins():
    printed = succeeds("plugins").splitlines()
    assert printed[1].split()[:3] == ["mergekit-lowrank", "mergekit-lowrank", __version__]
    assert "robustmerge" in printed[1]


def test_plugins_shows_what_failed_and_why_with_status_0(monkeypatch):
    broken = EntryPoint("broken", "no_such_module", "mergekit_lowrank")
    monkeypatch.setattr("mergekit_lowrank.registry.entry_points", lambda group: [broken])
    monkeypatch.delenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS")
    cause = "importing no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'"
    assert f"FAILED: {cause}" in succeeds("plugins")
    records = json.loads(succeeds("plugins", "--json"))
    assert [record["error"] for record in records] == [None, cause]


def test_schema_is_the_schema_of_recipes():
    assert json.loads(succeeds("schema")) == recipe_schema()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_command(shell):
    printed = succeeds("completion", shell)
    assert "_MERGEKIT_LOWRANK_COMPLETE" in printed
    assert "mergekit-lowrank" in printed


def test_completion_knows_three_shells():
    result = run("completion", "tcsh")
    assert result.exit_code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in result.stderr
