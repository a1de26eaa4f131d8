from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe import Recipe, load_recipe, parse_recipe, recipe_schema, resolve

RECIPE = """\
merge_method: ties
models:
  - model: a
    parameters: {weight: {file: weights.csv}}
  - model: b
"""
WEIGHTS = "pattern,value\nq_proj,0.5\nglob:*.mlp.*,-1\n*,1e-2\n"
EXPANDED = [
    {"filter": "q_proj", "value": 0.5},
    {"filter": "glob:*.mlp.*", "value": -1},
    {"filter": "*", "value": 0.01},
]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "weights.csv").write_text(WEIGHTS)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def weight(recipe: Recipe, index: int = 0) -> Any:
    return recipe.model_dump(mode="json", exclude_unset=True)["models"][index]["parameters"]["weight"]


def problem(recipe_file: Path, text: str) -> str:
    (recipe_file.parent / "weights.csv").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    return str(caught.value)


def test_a_file_is_the_filters_that_it_lists(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert weight(recipe) == EXPANDED
    value = recipe.models[0].parameters["weight"]
    found = [resolve(value, name, depth=0) for name in ("layers.0.q_proj", "layers.0.mlp.up", "head")]
    assert found == [0.5, -1, 0.01]


def test_the_written_recipe_holds_the_values_and_needs_no_file(recipe_file: Path) -> None:
    text = load_recipe(recipe_file).to_yaml()
    (recipe_file.parent / "weights.csv").unlink()
    assert weight(parse_recipe(text)) == EXPANDED


def test_any_parameter_may_be_a_file_in_the_recipe_a_model_or_a_rule(recipe_file: Path) -> None:
    (recipe_file.parent / "weights.csv").write_text("pattern,value\n*,3\n")
    parameters = {"k": {"file": "weights.csv"}}
    data = {
        "merge_method": "ties",
        "models": [{"model": "a", "parameters": parameters}],
        "parameters": parameters,
        "rules": ({"match": "q", "parameters": {"k": {"file": Path("weights.csv")}}},),
    }
    recipe = parse_recipe(data, directory=recipe_file.parent)
    for own in (recipe.parameters, recipe.models[0].parameters, recipe.rules[0].parameters):
        value = resolve(own["k"], "q", depth=0)
        assert value == 3
        assert isinstance(value, int)


def test_an_override_may_name_a_file(recipe_file: Path) -> None:
    (recipe_file.parent / "more.csv").write_text("pattern,value\nhead,2.5\n")
    recipe = load_recipe(recipe_file, ["models[1].parameters.weight={file: more.csv}"])
    assert weight(recipe, 1) == [{"filter": "head", "value": 2.5}]
    again = load_recipe(recipe_file, ["models[0].parameters.weight.file=more.csv"])
    assert weight(again) == [{"filter": "head", "value": 2.5}]


def test_files_can_be_swept(recipe_file: Path) -> None:
    (recipe_file.parent / "more.csv").write_text("pattern,value\nhead,2.5\n")
    sweep = "sweep:\n  models[0].parameters.weight: [{file: weights.csv}, {file: more.csv}]\n"
    recipe_file.write_text(RECIPE + sweep)
    variants = load_recipe(recipe_file).variants()
    assert [(name, weight(variant)) for name, variant in variants] == [
        ("weight=file-weights.csv", EXPANDED),
        ("weight=file-more.csv", [{"filter": "head", "value": 2.5}]),
    ]


def test_blank_lines_spaces_quotes_windows_ends_and_a_byte_order_mark_are_read(recipe_file: Path) -> None:
    text = '\ufeffpattern, value\r\n\r\n"regex:layers\\.\\d{1,2}\\.q", +1.5\r\n   \r\n* , 2 \r\n'
    (recipe_file.parent / "weights.csv").write_bytes(text.encode())
    assert weight(load_recipe(recipe_file)) == [
        {"filter": r"regex:layers\.\d{1,2}\.q", "value": 1.5},
        {"filter": "*", "value": 2},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "weights.csv:1: expected the header 'pattern,value', found nothing"),
        ("\n\nmodule,weight\n", "weights.csv:3: expected the header 'pattern,value', found 'module,weight'"),
        ("pattern;value\nq;1\n", "weights.csv:1: expected the header 'pattern,value', found 'pattern;value'"),
        ("pattern,value\n", "weights.csv:1: nothing after the header; expected lines such as '*,0.5'"),
        ("pattern,value\n\nq,one\n", "weights.csv:3: expected a finite number, found 'one'"),
        ("pattern,value\nq,nan\n", "weights.csv:2: expected a finite number, found 'nan'"),
        ("pattern,value\nq,1e999\n", "weights.csv:2: expected a finite number, found '1e999'"),
        ("pattern,value\nq,1_0\n", "weights.csv:2: expected a finite number, found '1_0'"),
        ("pattern,value\nq,٣\n", "weights.csv:2: expected a finite number, found '٣'"),
        ("pattern,value\nq,\n", "weights.csv:2: expected a finite number, found ''"),
        ("pattern,value\nq\n", "weights.csv:2: expected a pattern and a value, found 1 cells"),
        (
            "pattern,value\nregex:a{1,2},3\n",
            (
                "weights.csv:2: expected a pattern and a value, found 3 cells; put a pattern that holds commas in "
                "double quotes"
            ),
        ),
        ("pattern,value\nq,1\n\nq,2\n", "weights.csv:4: the pattern 'q' stands twice (first in line 2)"),
        ('pattern,value\nq,1\n"k,1\n', "weights.csv:3: not valid CSV: unexpected end of data"),
        (
            "pattern,value\nq,1\n,1\n",
            "weights.csv:3: models[0].parameters.weight[1].filter: expected text that is not empty, found ''",
        ),
        (
            "pattern,value\nregex:(,1\n",
            (
                "weights.csv:2: models[0].parameters.weight[0].filter: '(' is not a regular expression: "
                "missing ), unterminated subpattern at position 0"
            ),
        ),
        (
            "pattern,value\n*,1\nq,1\n",
            (
                "weights.csv:2: models[0].parameters.weight[0]: this entry takes every module, so the entries after it "
                "never apply; put it last"
            ),
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(recipe_file: Path, text: str, expected: str) -> None:
    assert problem(recipe_file, text) == expected


def test_all_lines_of_all_files_that_are_wrong_are_told_together(recipe_file: Path) -> None:
    recipe_file.write_text(RECIPE + "    parameters: {weight: {file: none.csv}}\n")
    message = problem(recipe_file, "pattern,value\nq,x\nk,1\nv,y\n")
    assert message.startswith("3 problems:\n1. weights.csv:2: ")
    assert "2. weights.csv:4: expected a finite number, found 'y'" in message
    missing = recipe_file.parent / "none.csv"
    assert f"3. {recipe_file}:6:26: models[1].parameters.weight: there is no file {missing};" in message


def test_a_file_that_cannot_be_read_is_refused(recipe_file: Path) -> None:
    (recipe_file.parent / "weights.csv").unlink()
    (recipe_file.parent / "weights.csv").mkdir()
    with pytest.raises(RecipeError, match=r"weights\.csv cannot be read: "):
        load_recipe(recipe_file)
    with pytest.raises(RecipeError, match="cannot be read: Could not determine home directory"):
        load_recipe(recipe_file, ["models[0].parameters.weight={file: ~nobody-has-this-name/w.csv}"])


def test_a_file_that_is_too_large_or_no_text_is_refused(recipe_file: Path) -> None:
    path = recipe_file.parent / "weights.csv"
    path.write_bytes(b"pattern,value\n" + b"q,1\n" * (1 << 18))
    with pytest.raises(RecipeError, match="is larger than 1,048,576 bytes, the most that is read"):
        load_recipe(recipe_file)
    path.write_bytes(b"pattern,value\nq\xff,1\n")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 15 is 0xff\)"):
        load_recipe(recipe_file)


@pytest.mark.parametrize("value", [{"file": 3}, {"files": "weights.csv"}, {"file": "weights.csv", "scale": 2}, {}])
def test_another_mapping_is_no_file(recipe_file: Path, value: dict[str, Any]) -> None:
    data = {"merge_method": "ties", "models": [{"model": "a", "parameters": {"weight": value}}]}
    with pytest.raises(RecipeError, match=r"weight: expected a finite number, .* or \{file: PATH\}, found"):
        parse_recipe(data, directory=recipe_file.parent)


def test_the_schema_knows_files() -> None:
    for part in (recipe_schema(), recipe_schema()["$defs"]["ModelEntry"], recipe_schema()["$defs"]["Rule"]):
        forms = part["properties"]["parameters"]["additionalProperties"]["oneOf"]
        assert [form["required"] for form in forms if form.get("type") == "object"] == [["file"]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(content=st.binary(max_size=80).map(lambda tail: b"pattern,value\n" + tail) | st.binary(max_size=40))
def test_any_bytes_are_read_or_refused_as_a_recipe_is(recipe_file: Path, content: bytes) -> None:
    (recipe_file.parent / "weights.csv").write_bytes(content)
    try:
        recipe = load_recipe(recipe_file)
    except RecipeError:
        return
    assert weight(parse_recipe(recipe.to_yaml())) == weight(recipe)
