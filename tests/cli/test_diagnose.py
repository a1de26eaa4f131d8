from __future__ import annotations

import json

import pytest

from mergekit_lowrank.diagnostics import Diagnosis

from .builders import run, succeeds, tensors, tree, write_adapter, write_recipe


def test_diagnose_shows_inputs_modules_pairs_and_findings(recipe):
    blocks = succeeds("diagnose", recipe, "--quiet").split("\n\n")
    inputs, modules, pairs, legend, facts, findings = (block.splitlines() for block in blocks)
    assert [line.split()[:2] for line in inputs] == [["input", "weight"], ["1", "math"], ["2", "code"]]
    assert [line.split()[:4] for line in modules[1:]] == [["q_proj", "0-1", "2", "6"], ["v_proj", "0-1", "2", "6"]]
    assert [line.split()[0] for line in pairs] == ["cosine", "1", "2", "rows", "1", "2"]
    assert legend[0].startswith("norm: of scaling * B * A")
    assert facts[0] == "method        ties in delta"
    assert facts[1].endswith("of all that is added is against the sign that wins (all entries)")
    assert findings[0].split()[0] in ("info", "notice", "warning")


def test_diagnose_prints_the_rows_of_a_matrix_on_both_sides_of_the_diagonal(recipe):
    found = json.loads(succeeds("diagnose", recipe, "--json"))
    printed = succeeds("diagnose", recipe, "--quiet").splitlines()
    start = next(n for n, line in enumerate(printed) if line.startswith("rows \\ columns"))
    rows, columns = found["pairs"]["row_overlaps"][1][0], found["pairs"]["column_overlaps"][0][1]
    assert printed[start + 1].split() == ["1", "math", f"{columns:.2f}"]
    assert printed[start + 2].split() == ["2", "code", f"{rows:.2f}"]


def test_diagnose_json_is_the_diagnosis(recipe):
    found = Diagnosis.model_validate_json(succeeds("diagnose", recipe, "--json"))
    assert found.labels == ("math", "code")
    assert len(found.modules) == 4


def test_diagnose_takes_a_method_instead_of_a_recipe(math, code):
    printed = succeeds("diagnose", "--method", "task_arithmetic", "math", "code", "--weights", "1", "-1", "--json")
    assert [own["weights"] for own in json.loads(printed)["inputs"]] == [[1, 1], [-1, -1]]


def test_diagnose_of_copies_warns(tmp_path, math):
    write_adapter(tmp_path / "copy", tensors(seed=1))
    write_recipe(tmp_path / "recipe.yaml", "math", "copy")
    printed = succeeds("diagnose", "recipe.yaml", "--quiet")
    assert "warning  math and copy are the same update (cosine 1.0000)\n" in printed
    assert "         keep one of them, or it counts twice\n" in printed


def test_diagnose_writes_nothing_but_the_page_asked_for(recipe, tmp_path):
    before = tree(tmp_path)
    succeeds("diagnose", recipe)
    assert tree(tmp_path) == before
    succeeds("diagnose", recipe, "--html", "page.html")
    assert {*tree(tmp_path)} == {*before, "page.html"}
    assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["recipe.yaml", "--set", "merge_method=tise"], "did you mean 'ties'"),
        (["recipe.yaml", "--set", "sweep={parameters.density: [0.2, 0.5]}"], "a sweep of 2 variants"),
    ],
)
def test_diagnose_refuses_what_a_merge_refuses(recipe, arguments, message):
    result = run("diagnose", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(("page", "said"), [("there", "is a directory"), ("nowhere/page.html", "does not exist")])
def test_a_page_that_cannot_be_written_is_known_before(recipe, tmp_path, monkeypatch, page: str, said: str) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("mergekit_lowrank.cli.diagnosing.diagnose", lambda *_, **__: pytest.fail("diagnosed"))
    result = run("diagnose", recipe, "--html", str(tmp_path / page))
    assert result.exit_code == 2
    assert said in result.stderr
