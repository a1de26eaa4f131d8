"""What the model card of an output says, as the Hub reads it and as people do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_lowrank import merge
from mergekit_lowrank.recipe import parse_recipe
from mergekit_lowrank.recipe.document import read_yaml
from mergekit_lowrank.testing import write_tiny_adapter

SHAPES = {"layers.0.q": (4, 4), "layers.1.q": (4, 4)}


def source(root: Path, label: str, front: str = "", **config: Any) -> Path:
    path = write_tiny_adapter(root / label, SHAPES, base_model="org/base")
    stored = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(stored | config))
    if front:
        (path / "README.md").write_text(f"---\n{front}\n---\n# {label}\n")
    return path


def card_of(paths: list[Path], **keys: Any) -> tuple[dict[str, Any], str]:
    """The front matter and the body of the card of a merge."""
    models = [{"model": str(path)} for path in paths]
    merge({"merge_method": "linear", "models": models, **keys}, paths[0].parent / "out")
    front, _, body = (paths[0].parent / "out" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    data = read_yaml(front, locate=lambda line, column: f"{line}:{column}").data
    assert isinstance(data, dict)
    return data, body


def test_a_bare_merge_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    front, body = card_of([source(tmp_path, "math"), source(tmp_path, "code")])
    assert front == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["lora", "merge", "mergekit-lowrank"],
    }
    assert "| `math` | 1 | not given | `" in body
    assert "\nBase model: `org/base`.\n" in body


def test_licence_and_task_are_those_of_the_sources(tmp_path: Path) -> None:
    text = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\npipeline_tag: text-generation"
    front, body = card_of([source(tmp_path, "math", text), source(tmp_path, "code")])
    assert [front[key] for key in ("license", "license_name", "license_link")] == ["other", "llama3", "LICENSE"]
    assert front["pipeline_tag"] == "text-generation"
    assert "| `math` | 1 | other (llama3) |" in body
    assert "| `code` | 1 | not given |" in body


def test_licences_that_conflict_are_listed_under_other(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    paths = [source(tmp_path, "math", "license: apache-2.0"), source(tmp_path, "code", "license: cc-by-nc-4.0")]
    front, body = card_of(paths, base_model=str(base))
    assert front["license"] == "other"
    assert "license_name" not in front
    for line in ("| `math` | 1 | apache-2.0 |", "| `code` | 1 | cc-by-nc-4.0 |", "`org/base`, licence llama3.1.\n"):
        assert line in body


def test_the_base_is_named_as_the_hub_knows_it_with_its_revision(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    paths = [source(tmp_path, "math", revision="abc123"), source(tmp_path, "code")]
    front, body = card_of(paths, base_model=str(tmp_path / "base"))
    assert front["base_model"] == "org/base"
    assert "\nBase model: `org/base`, revision `abc123`.\n" in body


@pytest.mark.parametrize(
    ("task_type", "fronts", "expected"),
    [
        ("SEQ_CLS", ("", ""), "text-classification"),
        ("SEQ_CLS", ("pipeline_tag: fill-mask", "pipeline_tag: fill-mask"), "fill-mask"),
        ("CAUSAL_LM", ("pipeline_tag: fill-mask", "pipeline_tag: summarization"), "text-generation"),
        ("SOMETHING_NEW", ("", ""), None),
    ],
)
def test_the_task_is_that_of_the_cards_else_of_the_configurations(
    tmp_path: Path, task_type: str, fronts: tuple[str, str], expected: str | None
) -> None:
    paths = [source(tmp_path, str(i), front, task_type=task_type) for i, front in enumerate(fronts)]
    front, _ = card_of(paths)
    assert front.get("pipeline_tag") == expected


def test_a_broken_card_of_a_source_stops_nothing(tmp_path: Path) -> None:
    front, body = card_of([source(tmp_path, "math", "license: ["), source(tmp_path, "code", "license: mit")])
    assert front["license"] == "mit"
    assert "| `math` | 1 | not given |" in body


def test_weights_that_differ_by_module_are_a_range(tmp_path: Path) -> None:
    weights = tmp_path / "weights.csv"
    weights.write_text("pattern,value\nlayers.0,0.5\n*,-1\n")
    _, body = card_of(
        [source(tmp_path, "math"), source(tmp_path, "code")], parameters={"weight": {"file": str(weights)}}
    )
    assert "| `math` | -1 to 0.5, by module |" in body
    recipe = body.partition("```yaml\n")[2].partition("```")[0]
    expected = [{"filter": "layers.0", "value": 0.5}, {"filter": "*", "value": -1}]
    assert parse_recipe(recipe).model_dump(mode="json")["parameters"] == {"weight": expected}
