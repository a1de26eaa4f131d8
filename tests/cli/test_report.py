from __future__ import annotations

import json
import shutil
import sys

import pytest

from mergekit_lowrank import Registry, merge
from mergekit_lowrank.cli.commands import SCHEMAS

from .builders import run, succeeds, tensors, tree, write_adapter


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """``merged`` by ties, and ``other`` by linear, of the same adapters."""
    root = tmp_path_factory.mktemp("merges")
    models = [{"model": str(write_adapter(root / name, tensors(seed=seed)))} for seed, name in enumerate("ab")]
    for name, method in (("merged", "ties"), ("other", "linear")):
        merge({"merge_method": method, "models": models}, root / name, registry=Registry())
    return root


@pytest.fixture
def merged(merges, workplace):
    return shutil.copytree(merges / "merged", workplace / "merged")


@pytest.fixture
def other(merges, merged, workplace):
    return shutil.copytree(merges / "other", workplace / "other")


def test_the_page_of_a_merge_is_made_again(merged):
    before = tree(merged)
    (merged / "report.html").unlink()
    assert succeeds("report", "merged") == "wrote merged/report.html\n"
    assert tree(merged) == before


def test_the_page_goes_to_another_file(merged, workplace):
    before = tree(merged)
    succeeds("report", "merged", "-o", "page.html")
    assert (workplace / "page.html").read_bytes() == before["report.html"]
    assert tree(merged) == before


def test_a_file_that_is_there_is_replaced_only_if_that_is_asked_for(merged, workplace):
    page = workplace / "page.html"
    page.write_text("mine")
    result = run("report", "merged", "-o", "page.html")
    assert result.exit_code == 2
    assert (
        "page.html: exists already. Choose another path, or allow it to be overwritten (--overwrite)." in result.stderr
    )
    assert page.read_text() == "mine"
    succeeds("report", "merged", "-o", "page.html", "--overwrite")
    assert page.read_text().startswith("<!doctype html>")


def test_an_interactive_page_holds_plotly(merged):
    pytest.importorskip("plotly")
    succeeds("report", "merged", "--interactive")
    page = (merged / "report.html").read_text(encoding="utf-8")
    assert "plotly.js v" in page
    assert page.count('class="plot"') > 10
    assert 'class="heatmap"' not in page
    assert [path.name for path in merged.parent.glob(".*")] == []


def test_figures_are_written_as_images(other, workplace, monkeypatch):
    monkeypatch.setattr("mergekit_lowrank.cli.reporting.write_image", lambda figure, path: path.write_text(figure.key))
    printed = succeeds("report", "merged", "other", "--png", "figures")
    names = sorted(path.name for path in (workplace / "figures").iterdir())
    assert {"distance.png", "spectra-q-proj.png"} <= {*names}
    assert [(workplace / "figures" / name).read_text() + ".png" for name in names] == names
    assert all(f"wrote figures/{name}\n" in printed for name in names)


def test_an_image_that_is_there_stops_all_before_anything_is_written(merged, workplace):
    (workplace / "figures").mkdir()
    (workplace / "figures" / "modules-cosine.pdf").write_text("mine")
    before = tree(workplace)
    result = run("report", "merged", "-o", "page.html", "--pdf", "figures")
    assert result.exit_code == 2
    assert "figures/modules-cosine.pdf: exists already" in result.stderr
    assert tree(workplace) == before


@pytest.mark.parametrize(("option", "package"), [("--interactive", "plotly.offline"), ("--png=figures", "matplotlib")])
def test_without_the_extra_the_error_names_it(merged, monkeypatch, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run("report", "merged", option)
    assert result.exit_code == 2
    assert "pip install 'mergekit-lowrank[report]'" in result.stderr


def test_two_merges_are_compared_in_words(other):
    lines = succeeds("report", "merged", "other").splitlines()
    assert lines[1].split() == ["directory", "merged", "other"]
    assert lines[2].split() == ["method", "ties", "linear"]
    (recipe,) = [line for line in lines if line.startswith("recipe")]
    assert recipe == "recipe    merge_method: ties -> linear"
    (distance,) = [line for line in lines if line.startswith("distance")]
    assert distance.endswith("in 4 modules)")


def test_a_merge_and_itself_are_said_to_be_equal(merged):
    printed = succeeds("report", "merged", "merged")
    assert "distance  0 of the norm of A (0 to 0 in 4 modules)" in printed
    assert "factors   the same in every module" in printed
    assert "recipe    the same" in printed


def test_two_merges_are_compared_on_a_page(other, workplace):
    printed = succeeds("report", "merged", "other", "-o", "comparison.html")
    assert "wrote comparison.html\n" in printed
    page = (workplace / "comparison.html").read_text(encoding="utf-8")
    assert "Distance of the updates" in page
    assert "merge_method" in page


def test_reports_in_json(other):
    one = json.loads(succeeds("report", "merged", "--json"))
    assert one == json.loads((other.parent / "merged" / "report.json").read_text())
    both = json.loads(succeeds("report", "merged", "other", "--json"))
    assert both["recipe"] == [{"key": "merge_method", "a": "ties", "b": "linear"}]
    assert len(both["modules"]) == 4


def test_a_quiet_report_says_nothing(merged):
    assert succeeds("report", "merged", "--quiet") == ""


def test_a_directory_that_no_merge_wrote_is_refused(math):
    result = run("report", "math")
    assert result.exit_code == 2
    assert "math: has no report.json; expected what a merge has made." in result.stderr


def test_a_sweep_names_its_variants(recipe):
    recipe.write_text(f"{recipe.read_text()}sweep: {{parameters.density: [0.5, 1.0]}}\n")
    succeeds("merge", recipe, "swept", "--quiet")
    result = run("report", "swept")
    assert result.exit_code == 2
    assert "swept: holds a sweep. Name one of its variants: " in result.stderr


@pytest.mark.parametrize("count", [0, 3])
def test_an_output_or_two_are_reported_on(count, merged):
    result = run("report", *["merged"] * count)
    assert result.exit_code == 2
    assert f"expected one output or two, found {count}" in result.stderr


@pytest.mark.parametrize("beside", [(), ("merged",)])
@pytest.mark.parametrize(("name", "said"), [("nothing", "there is no such directory"), ("page", "is no directory")])
def test_what_is_no_directory_is_named(beside, name, said, merged, workplace):
    (workplace / "page").write_text("mine")
    result = run("report", *beside, name)
    assert result.exit_code == 2
    assert f"error: {name}: {said}; expected what a merge has made." in result.stderr


def test_images_do_not_go_into_a_file(merged, workplace):
    (workplace / "figures").write_text("mine")
    result = run("report", "merged", "--png", "figures")
    assert result.exit_code == 2
    assert "error: figures: is no directory; expected one to write images into." in result.stderr


def test_a_page_that_cannot_be_written_is_named_as_it_was_asked_for(merged, workplace):
    result = run("report", "merged", "-o", "nothing/page.html")
    assert result.exit_code == 2
    assert "error: nothing/page.html: cannot be written: No such file or directory." in result.stderr
    (workplace / "page").mkdir()
    result = run("report", "merged", "-o", "page", "--overwrite")
    assert "error: page: cannot be written: " in result.stderr
    assert [path.name for path in workplace.glob(".*")] == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_schema_is_one(kind):
    validators = pytest.importorskip("jsonschema")
    schema = json.loads(succeeds("schema", kind))
    validators.Draft202012Validator.check_schema(schema)
    assert schema["properties"]


@pytest.mark.parametrize(("kind", "file"), [("report", "report.json"), ("manifest", "manifest.json")])
def test_what_a_merge_writes_is_of_its_schema(merged, kind, file):
    validators = pytest.importorskip("jsonschema")
    written = json.loads((merged / file).read_text())
    validators.validate(written, json.loads(succeeds("schema", kind)))


def test_the_schema_of_reports_knows_every_field_and_no_other(merged):
    schema = json.loads(succeeds("schema", "report"))
    written = json.loads((merged / "report.json").read_text())
    record = schema["properties"]["modules"]["items"]
    assert {*record["properties"]} == {*record["required"]} == {*written["modules"][0]}
    assert {*schema["properties"]} == {*written}
    assert all(field["description"] for field in record["properties"].values())


def test_what_is_compared_is_of_its_schema(other):
    validators = pytest.importorskip("jsonschema")
    found = json.loads(succeeds("report", "merged", "other", "--json"))
    validators.validate(found, json.loads(succeeds("schema", "comparison")))


def test_the_schema_of_recipes_is_the_default():
    assert succeeds("schema") == succeeds("schema", "recipe")
