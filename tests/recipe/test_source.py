from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lowrank.errors import MergeError, RecipeError
from mergekit_lowrank.recipe import load_recipe, parse_recipe

RECIPE = """\
merge_method: ties
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
parameters:
  density: 0.5
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_knows_where_its_values_stand(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.where(("models", 0, "parameters", "weight")) == f"{recipe_file}:4:26"
    assert recipe.where(("parameters", "density"), key=True) == f"{recipe_file}:7:3"
    assert recipe.where(("models", 1, "parameters", "weight")) == f"{recipe_file}:5:5"
    assert recipe.where(("seed",)) == f"{recipe_file}:1:1"


def test_a_recipe_knows_its_directory(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe_file.parent)
    assert load_recipe("recipe.yaml").directory == recipe_file.parent
    assert load_recipe("recipe.yaml").where(("scale",)) == "recipe.yaml:1:1"


def test_a_mapping_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe({"merge_method": "ties", "models": [{"model": "a"}]})
    assert recipe.directory == tmp_path
    assert recipe.where(("models", 0)) == "recipe"


def test_any_mapping_will_do() -> None:
    data = OrderedDict(merge_method="ties", models=({"model": "a"},))
    assert parse_recipe(data).models[0].model == "a"


def test_a_mapping_is_not_changed() -> None:
    data: dict[str, Any] = {"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"lambda": 2}}
    parse_recipe(data, ["models[0].parameters.weight=2", "parameters.k=1"])
    assert data == {"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"lambda": 2}}


def test_a_recipe_is_returned_as_it_is(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert load_recipe(recipe) is recipe


def test_a_recipe_makes_problems_that_say_where(recipe_file: Path) -> None:
    problem = load_recipe(recipe_file).problem(("parameters", "density"), "expected at most 1, found 7")
    assert str(problem) == f"{recipe_file}:7:12: parameters.density: expected at most 1, found 7"


def test_every_problem_is_reported_with_its_place() -> None:
    text = "merge_method: ties\nmodels:\n  - model: a\n    wieght: 1\nparameters:\n  density: [0.5, x]\nseed: -1\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "recipe.yaml:4:5: models[0].wieght: unknown key 'wieght'; the keys here are model, parameters",
        "recipe.yaml:6:18: parameters.density[1]: expected a finite number, found 'x'",
        "recipe.yaml:7:7: seed: expected a whole number between 0 and 2^63 - 1, found -1",
    ]


def test_an_error_in_an_aliased_value_points_to_where_it_is_written() -> None:
    text = "merge_method: ties\nmodels: [{model: a}]\nparameters: {a: &x [1, y], b: *x}"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert ["3:24" in str(problem) for problem in caught.value.problems] == [True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: expected a mapping with keys such as 'merge_method' and 'models', found nothing"),
        ("\n- a\n", r"recipe:2:1: expected a mapping with keys such as .*, found \['a'\]"),
        ("just text", "recipe:1:1: expected a mapping with keys such as .*, found 'just text'"),
        ("{}", "recipe:1:1: merge_method: missing key 'merge_method'"),
    ],
)
def test_text_that_is_no_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"/none.yaml: there is no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory; name the recipe file in it"):
        load_recipe(tmp_path)


def test_a_path_through_a_file_cannot_be_read(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read: .*Not a directory"):
        load_recipe(recipe_file / "x")


def test_a_name_with_a_nul_cannot_be_read() -> None:
    with pytest.raises(RecipeError, match="cannot be read: embedded null byte"):
        load_recipe("a\0b")


def test_bytes_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match=r"r.yaml: not UTF-8 text \(byte 3 is 0xff\)"):
        load_recipe(tmp_path / "r.yaml")


def test_a_byte_order_mark_is_skipped(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe(recipe_file).merge_method == "ties"


def test_a_file_beyond_the_bound_is_refused(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="larger than 1,048,576 bytes"):
        load_recipe(recipe_file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary() | st.text().map(str.encode))
def test_any_bytes_give_a_recipe_or_a_merge_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(data)
    with pytest.raises(MergeError):
        load_recipe(path)


keys = (
    st.sampled_from(
        [
            "merge_method",
            "models",
            "parameters",
            "scale",
            "output",
            "rules",
            "match",
            "rank",
            "lambda",
            "weight",
            "sweep",
        ]
    )
    | st.text()
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
)


@given(st.dictionaries(keys | st.integers(), anything, max_size=6))
def test_any_mapping_gives_a_recipe_or_a_merge_error(data: dict[Any, Any]) -> None:
    try:
        parse_recipe(data)
    except MergeError as error:
        assert all("\n" not in str(problem) for problem in error.problems)  # noqa: PT017


class TestOverrides:
    def test_set_a_value(self, recipe_file: Path) -> None:
        recipe = load_recipe(
            recipe_file, ["parameters.density=0.9", "models[1].parameters.weight=-1", "output.rank=sum"]
        )
        assert recipe.parameters["density"] == 0.9
        assert recipe.models[1].parameters == {"weight": -1}
        assert recipe.output.rank == "sum"

    def test_take_yaml_values(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file, ["parameters.density=[0, 1]", "scale={retention: 0.5}"])
        assert recipe.parameters["density"] == (0.0, 1.0)

    def test_say_themselves_where_they_are(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file, ["parameters={density: 0.9}"])
        assert recipe.where(("parameters", "density")) == "--set parameters={density: 0.9}"
        assert recipe.where(("models",)) == f"{recipe_file}:3:3"

    def test_the_last_one_wins(self, recipe_file: Path) -> None:
        assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2

    def test_fill_in_an_empty_mapping(self) -> None:
        assert parse_recipe("merge_method: a\nmodels: [{model: a}]\noutput:\n", ["output.rank=3"]).output.rank == 3

    def test_apply_to_a_recipe_object_and_leave_it_alone(self, recipe_file: Path) -> None:
        recipe = load_recipe(recipe_file)
        changed = load_recipe(recipe, ["parameters.density=0.9"])
        assert (recipe.parameters["density"], changed.parameters["density"]) == (0.5, 0.9)
        assert changed.directory == recipe.directory
        assert changed.where(("models", 0, "model")) == f"{recipe_file}:3:12"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("parameters.density", "--set parameters.density: expected path=value, such as parameters.density=0.5"),
            ("=3", "--set =3: expected path=value"),
            ("models[x]=3", "expected path=value"),
            ("seed=-1", "--set seed=-1: seed: expected a whole number"),
            ("seed=[", r"--set seed=\[: not valid YAML"),
            ("sede=1", r"--set sede=1: sede: unknown key 'sede'; did you mean 'seed'\?"),
            (
                "merge_method.x=1",
                "--set merge_method.x=1: 'merge_method' is 'ties', not a mapping, so it has no key 'x'",
            ),
            ("models.x=1", r"'models' is \[.*\], not a mapping"),
            ("models[2].model=x", r"'models' has 2 entries, counted from \[0\]; there is no \[2\]"),
            ("parameters[0]=1", r"'parameters' is {'density': 0.5}, not a list, so it has no entry \[0\]"),
            ("rules[0].match=x", r"'rules' is null, not a list, so it has no entry \[0\]"),
            (".".join("a" * 40) + "=1", "the path has more than 32 steps"),
        ],
    )
    def test_errors_name_the_override(self, recipe_file: Path, override: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(recipe_file, [override])
        assert str(caught.value).startswith("--set ")

    @given(st.text(alphabet="abmodels.[]01=-{}:&* \n"))
    def test_any_text_gives_a_recipe_or_a_merge_error(self, override: str) -> None:
        with contextlib.suppress(MergeError):
            parse_recipe(RECIPE, [override])


class TestLambda:
    def test_is_read_as_scale(self) -> None:
        recipe = parse_recipe(RECIPE + "  lambda: 0.3\n")
        assert recipe.scale == 0.3
        assert recipe.parameters == {"density": 0.5}
        assert recipe.where(("scale",)) == "recipe:8:11"

    def test_is_read_in_rules_too(self) -> None:
        recipe = parse_recipe(RECIPE + "rules:\n  - match: q\n    parameters: {lambda: 2}\n")
        assert recipe.rules[0].scale == 2.0
        assert recipe.where(("rules", 0, "scale")) == "recipe:10:26"

    def test_may_agree_with_scale(self) -> None:
        assert parse_recipe(RECIPE + "  lambda: 1\nscale: 1.0\n").scale == 1.0

    def test_that_contradicts_scale_is_refused(self) -> None:
        with pytest.raises(
            RecipeError, match=r"recipe:8:3: parameters.lambda: .* \(where both stand, they must be equal\)"
        ):
            parse_recipe(RECIPE + "  lambda: 1\nscale: 2\n")

    def test_out_of_range_is_told_at_its_place(self) -> None:
        with pytest.raises(RecipeError, match=r"recipe:8:11: scale: expected a finite number"):
            parse_recipe(RECIPE + "  lambda: [0, 1]\n")
