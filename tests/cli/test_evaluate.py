from __future__ import annotations

import json
import sys

import pytest

from .builders import run, succeeds

TASKS = """
tasks:
  sums: &judge {expert: math, python: "judges:judge"}
  chess: {<<: *judge, expert: null}
"""
JUDGES = """
def judge(adapter, base):
    right = {None: 20, "math": 80, "merged": 60}[adapter and adapter.name]
    return [1] * right + [0] * (100 - right)
"""


@pytest.fixture(autouse=True)
def judges(workplace, recipe):
    (workplace / "tasks.yaml").write_text(TASKS)
    (workplace / "judges.py").write_text(JUDGES)
    yield
    sys.modules.pop("judges", None)


def test_evaluate_prints_scores_intervals_and_what_is_noise():
    result = run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml", "--resamples", 400)
    assert result.exit_code == 0
    head, sums, *_ = lines = result.stdout.splitlines()
    assert head.split() == ["task", "expert", "base", "own", "merged", "%", "of", "own", "merged", "-", "base"]
    assert sums.split()[:5] == ["sums", "math", "20.0", "80.0", "60.0"]
    assert sums.endswith(" better")
    assert "mean of seen tasks: the merge is better than the base beyond noise" in lines
    assert "sums: base 0.2 (in" in result.stderr


def test_quiet_leaves_the_table(workplace):
    result = run("--quiet", "evaluate", "recipe.yaml", "--tasks", "tasks.yaml", "--resamples", 10)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "mean of seen tasks" in result.stdout


def test_evaluate_writes_and_prints_the_same_json(workplace):
    printed = succeeds("evaluate", "recipe.yaml", "--tasks", "tasks.yaml", "-o", "found.json", "--json", "--seed", 3)
    assert printed == (workplace / "found.json").read_text()
    assert json.loads(printed)["seed"] == 3


def test_two_merges_are_told_apart_or_not():
    succeeds("merge", "recipe.yaml", "merged")
    out = succeeds("evaluate", "merged", "--tasks", "tasks.yaml", "--against", "merged", "--resamples", 50)
    assert "mean of seen tasks: the difference to the other merge is within noise" in out
    assert "+0.0 [+0.0, +0.0] within noise" in out


def test_a_slip_in_the_tasks_is_an_error_of_the_user(workplace):
    (workplace / "tasks.yaml").write_text("tasks: {arc: {command: 'run {adaptor}', score: acc}}")
    result = run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: tasks.yaml:1:24: tasks.arc.command: unknown placeholder {adaptor}")


def test_a_failing_evaluator_exits_with_2(workplace):
    (workplace / "judges.py").write_text("def judge(adapter, base): raise KeyError('arc')\n")
    result = run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml")
    assert result.exit_code == 2
    assert "error: task 'sums', the base: judges:judge raised KeyError: 'arc' (judges.py:1)" in result.stderr


@pytest.mark.parametrize(("options", "is_told"), [((), True), (("-o", "found.json"), False)])
def test_a_failure_tells_how_finished_runs_are_kept(workplace, options, is_told):
    (workplace / "judges.py").write_text("def judge(adapter, base): raise SystemExit(0)\n")
    result = run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml", *options)
    assert result.exit_code == 2
    assert "judges:judge raised SystemExit: 0 (judges.py:1)" in result.stderr
    assert ("add -o FILE so that finished runs are kept" in result.stderr) is is_told


def test_the_schema_of_tasks_takes_a_tasks_file(workplace):
    validators = pytest.importorskip("jsonschema")
    schema = json.loads(succeeds("schema", "tasks"))
    validators.Draft202012Validator.check_schema(schema)
    command = {"command": "run {adapter}", "score": "results.acc", "examples": {"path": ["a", 0]}, "count": 10}
    validators.validate({"tasks": {"arc": command, "math": {"python": "judges:judge"}}}, schema)
    validators.validate({"tasks": {"arc": {"command": ["run", "{adapter}"], "score": ["a", "b"]}}}, schema)
    for wrong in ({"tasks": {"arc": {"comand": "x"}}}, {"tasks": {"arc": {"command": 3}}}, {}):
        assert not validators.Draft202012Validator(schema).is_valid(wrong)


def test_an_interrupted_evaluation_says_what_is_kept(workplace):
    (workplace / "judges.py").write_text(f"{JUDGES}\n    raise KeyboardInterrupt\n".replace("    return", "    _ ="))
    result = run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml", "-o", "found.json")
    assert result.exit_code == 130
    assert "interrupted: the runs so far are in found.json; run the same command again to go on" in result.stderr


@pytest.mark.parametrize("option", [("--timeout", "0"), ("--resamples", "0"), ("--seed", "-1")])
def test_numbers_out_of_range_are_refused(option):
    assert run("evaluate", "recipe.yaml", "--tasks", "tasks.yaml", *option).exit_code == 2
