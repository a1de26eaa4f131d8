"""The tokenizer, the header and the licences of whole merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from mergekit_lowrank import IncompatibleInputsError, merge, plan
from tests.docs.models import write_models


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters ``math`` and ``code`` and their base, each with a tokenizer; that of the base differs."""
    write_models(tmp_path)
    for label in ("base", "math", "code"):
        text = "base" if label == "base" else "tuned"
        (tmp_path / label / "vocab.txt").write_text(text)
        (tmp_path / label / "chat_template.jinja").write_text(text)
    (tmp_path / "base" / "merges.txt").write_text("base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(**keys: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": "math"}, {"model": "code"}], **keys}


def test_an_adapter_lies_beside_the_tokenizer_of_its_inputs(models: Path) -> None:
    merge(recipe_of(), "out")
    assert (models / "out" / "vocab.txt").read_text() == "tuned"
    assert (models / "out" / "chat_template.jinja").read_text() == "tuned"
    listed = {file["name"] for file in json.loads((models / "out" / "manifest.json").read_text())["outputs"]}
    assert {"vocab.txt", "chat_template.jinja"} <= listed
    merge(recipe_of(), "out", overwrite=True)


@pytest.mark.parametrize("source", ["base", "code"])
def test_a_model_gets_the_one_that_is_chosen_and_nothing_of_another(models: Path, source: str) -> None:
    merge(recipe_of(base_model="base", output={"kind": "model"}, tokenizer_source=source), "out")
    assert (models / "out" / "vocab.txt").read_text() == ("base" if source == "base" else "tuned")
    assert (models / "out" / "merges.txt").exists() is (source == "base")
    assert (models / "out" / "config.json").exists()


def test_tokenizers_that_differ_are_an_error_of_the_plan(models: Path) -> None:
    with pytest.raises(IncompatibleInputsError, match=r"the tokenizers differ\. 'base' and 'math': "):
        plan(recipe_of(base_model="base", output={"kind": "model"}))
    (models / "code" / "vocab.txt").write_text("other")
    with pytest.raises(IncompatibleInputsError, match=r"the tokenizers differ\. 'math' and 'code': "):
        plan(recipe_of())


def test_licences_that_conflict_and_filters_without_a_module_are_warnings_of_the_plan(models: Path) -> None:
    for label, licence in {"math": "mit", "code": "cc-by-nc-4.0"}.items():
        (models / label / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    weight = [{"filter": "q_prj", "value": 2}, {"value": 1}]
    filters, licences = plan(recipe_of(parameters={"weight": weight})).warnings
    assert filters.startswith("parameters.weight: the filters 'q_prj' take no module")
    assert licences.startswith("the sources have different licences ('math': mit; 'code': cc-by-nc-4.0)")


def test_the_header_of_the_file_tells_the_sources(models: Path) -> None:
    report = merge(recipe_of(), "out")
    with safe_open(models / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert report.inputs[0].label == "math"
    assert metadata["format"] == "pt"
    assert metadata["merge_method"] == "linear"
    assert json.loads(metadata["sources"]) == [{"label": "math", "weight": 1.0}, {"label": "code", "weight": 1.0}]


def test_the_written_recipe_runs_again_whatever_name_the_tokenizer_was_given_by(models: Path) -> None:
    (models / "code" / "vocab.txt").write_text("other")
    for source in ("code", "./code"):
        recipe = {
            "merge_method": "linear",
            "models": [{"model": "math"}, {"model": source}],
            "tokenizer_source": source,
        }
        merge(recipe, "out", overwrite=True)
        merge("out/recipe.yaml", "again", overwrite=True)
        assert (models / "again" / "vocab.txt").read_text() == "other"
    merge(recipe_of(base_model="base", tokenizer_source="base"), "out", overwrite=True)
    merge("out/recipe.yaml", "again", overwrite=True)
    assert (models / "again" / "vocab.txt").read_text() == "base"
