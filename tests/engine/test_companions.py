from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lowrank.engine.companions import planned_tokenizer, with_tokenizer
from mergekit_lowrank.errors import CheckpointError, IncompatibleInputsError, RecipeError
from mergekit_lowrank.formats import Checkpoint, PeftFormat
from mergekit_lowrank.recipe import Recipe, parse_recipe
from mergekit_lowrank.testing import write_tiny_adapter


@pytest.fixture
def inputs(tmp_path: Path) -> list[Checkpoint]:
    """Two adapters whose tokenizers agree, and differ from that of the directory ``base``."""
    for label in ("base", "math", "code"):
        if label != "base":
            write_tiny_adapter(tmp_path / label, {"layers.0.q": (2, 2)})
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / "vocab.txt").write_text("x" if label == "base" else "y")
    checkpoints = [PeftFormat().open(tmp_path / label, label=label) for label in ("math", "code")]
    for checkpoint in checkpoints:
        checkpoint.location = f"./{checkpoint.label}"
    return checkpoints


def recipe_of(directory: Path, **keys: Any) -> Recipe:
    models = [{"model": "./math"}, {"model": "./code"}]
    return parse_recipe({"merge_method": "linear", "models": models, **keys}, directory=directory)


def chosen(directory: Path, inputs: list[Checkpoint], **keys: Any) -> str:
    (path,) = planned_tokenizer(recipe_of(directory, **keys), inputs).values()
    return path.parent.name


def test_an_adapter_gets_the_tokenizer_of_its_inputs_whatever_the_base_has(tmp_path: Path, inputs) -> None:
    assert chosen(tmp_path, inputs) == "math"
    assert chosen(tmp_path, inputs, base_model="base") == "math"


def test_an_adapter_of_inputs_without_one_gets_none(tmp_path: Path, inputs) -> None:
    for label in ("math", "code"):
        (tmp_path / label / "vocab.txt").unlink()
    assert planned_tokenizer(recipe_of(tmp_path, base_model="base"), inputs) == {}


def test_a_model_gets_that_of_the_base_only_where_the_inputs_agree(tmp_path: Path, inputs) -> None:
    model = {"base_model": "base", "output": {"kind": "model"}}
    with pytest.raises(
        IncompatibleInputsError, match=r"'base' and 'math': vocab\.txt: .* to the one to keep: base, 'math'"
    ):
        planned_tokenizer(recipe_of(tmp_path, **model), inputs)
    for label in ("math", "code"):
        (tmp_path / label / "vocab.txt").unlink()
    assert chosen(tmp_path, inputs, **model) == "base"


@pytest.mark.parametrize(
    ("source", "found"), [("base", "base"), ("code", "code"), ("./math", "math"), ("./code", "code")]
)
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_recipe_chooses(tmp_path: Path, inputs, kind: str, source: str, found: str) -> None:
    keys = {"base_model": "base", "output": {"kind": kind}, "tokenizer_source": source}
    assert chosen(tmp_path, inputs, **keys) == found


def test_a_base_that_is_not_here_has_no_tokenizer(tmp_path: Path, inputs) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: tokenizer_source: the base model is no directory here"):
        planned_tokenizer(recipe_of(tmp_path, base_model="org/base", tokenizer_source="base"), inputs)


def test_a_choice_without_a_tokenizer_is_refused(tmp_path: Path, inputs) -> None:
    (tmp_path / "code" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="'code' has no tokenizer"):
        planned_tokenizer(recipe_of(tmp_path, tokenizer_source="code"), inputs)


def test_another_tokenizer_takes_the_place_of_the_bases_own(tmp_path: Path) -> None:
    names = ("config.json", "vocab.txt", "tokenizer.model", "chat_template.jinja", "LICENSE", "1_Pooling/config.json")
    companions = {name: tmp_path / "base" / name for name in names}
    found = with_tokenizer(companions, {"tokenizer.json": tmp_path / "math" / "tokenizer.json"})
    assert {name: path.relative_to(tmp_path).parts[0] for name, path in found.items()} == {
        "config.json": "base",
        "LICENSE": "base",
        "1_Pooling/config.json": "base",
        "tokenizer.json": "math",
    }
