"""``strategies``, ``plugins``, ``schema`` and ``completion``."""

from __future__ import annotations

import json

import pytest

from mergekit_lowrank import Registry, __version__
from mergekit_lowrank.recipe import recipe_schema
from tests.distributions import MEDIAN, Environment

from .builders import run, succeeds


def described(name):
    (method,) = json.loads(succeeds("strategies", name, "--json"))
    return method, {parameter["name"]: parameter for parameter in method["parameters"]}


CATALOGUE = {
    "linear",
    "task_arithmetic",
    "cat",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "magnitude_prune",
    "sce",
    "consensus",
    "pcb",
    "robustmerge",
    "drm",
    "knots",
    "core_ties",
    "ctm",
}


def test_strategies_lists_every_method_with_its_default_space_first():
    printed = succeeds("strategies").splitlines()
    names = [line.split()[0] for line in printed[:-2] if not line.startswith(" ")]
    assert names == sorted(names)
    assert {"drm", "knots", "linear", "robustmerge", "ties"} <= set(names)
    assert any(
        line.strip().startswith("in delta, joint, core, tucker, factors") and "TIES-Merging" in line for line in printed
    )


def test_strategies_json_is_a_list_of_objects():
    methods = json.loads(succeeds("strategies", "--json"))
    assert {method["name"] for method in methods} >= CATALOGUE
    for method in methods:
        assert set(method) == {
            "name",
            "summary",
            "paper",
            "spaces",
            "parameters",
            "preset_of",
            "plugin",
            "min_inputs",
            "max_inputs",
            "default_rank",
            "has_artefacts",
            "is_random",
            "is_order_free",
        }
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
    assert f"Known: {', '.join(sorted(Registry().methods))}." in result.stderr


@pytest.fixture
def environment(tmp_path, monkeypatch):
    return Environment(tmp_path, monkeypatch)


def test_plugins_shows_the_built_ins_in_lines_that_can_be_read(environment):
    headline, *facts = succeeds("plugins").splitlines()
    assert headline == f"mergekit-lowrank {__version__}"
    hooks = ["strategies", "spaces", "formats", "writers", "executors"]
    assert [fact.split()[0] for fact in facts if fact[2] != " "] == hooks
    assert max(map(len, facts)) <= 110
    names = " ".join(facts).replace(",", "").split()
    assert set(Registry().methods) <= set(names)


def test_plugins_shows_each_distribution_with_what_it_registers(environment):
    environment.install("median-merge", MEDIAN, plugin="median")
    assert succeeds("plugins").split("\n\n")[1] == (
        "median-merge 1.2 (plugin 'median')\n"
        "  strategies  median\n"
    )  # fmt: skip


def test_plugins_shows_what_failed_and_why_with_status_0(environment):
    environment.install("broken", "import no_such_module")
    cause = "importing broken failed: ModuleNotFoundError: No module named 'no_such_module'"
    assert succeeds("plugins").split("\n\n")[1] == f"broken 1.2\n  FAILED  {cause}\n"
    plugins = json.loads(succeeds("plugins", "--json"))["plugins"]
    assert [record["error"] for record in plugins] == [None, cause]


def test_plugins_shows_a_plugin_for_another_api(environment):
    environment.install("later", "raise AssertionError", group="mergekit_lowrank.v2")
    assert "later 1.2\n  FAILED  later 1.2 was made for plugin API 2; " in succeeds("plugins")


def test_plugins_shows_what_is_disabled_and_what_is_no_plugin(environment, monkeypatch):
    environment.install("median-merge", MEDIAN, plugin="median")
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", "median,medain,zzz")
    variable = "MERGEKIT_LOWRANK_DISABLE_PLUGINS"
    assert succeeds("plugins").rstrip().split("\n\n")[1:] == [
        f"median-merge 1.2 (plugin 'median')\n  disabled  by {variable}; it was not imported",
        f"{variable} names 'medain', which is no installed plugin; did you mean 'median'?",
        f"{variable} names 'zzz', which is no installed plugin.",
    ]
    said = json.loads(succeeds("plugins", "--json"))
    assert said["unmatched"] == ["medain", "zzz"]
    assert said["api_version"] == 1
    assert [record["is_disabled"] for record in said["plugins"]] == [False, True]


def test_a_disabled_plugin_is_named_where_its_method_is_asked_for(environment, monkeypatch):
    environment.install("median-merge", MEDIAN, plugin="median")
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", "median")
    result = run("strategies", "median")
    assert result.exit_code == 2
    assert "(plugins that are disabled: 'median'; see `mergekit-lowrank plugins`)" in result.stderr


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
