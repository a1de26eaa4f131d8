# ruff: noqa: E501 (one case a line)
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe import ModelEntry, Recipe, Retention, load_recipe, parse_recipe

BASE = "merge_method: ties\nmodels:\n- model: a\n- model: b\nparameters: {density: 0.5}\n"


def swept(text: str) -> Recipe:
    return parse_recipe(f"{BASE}{text}", name="r.yaml")


def names(recipe: Recipe) -> list[str]:
    return [name for name, _ in recipe.variants()]


def test_without_a_sweep_the_recipe_is_its_only_variant() -> None:
    recipe = parse_recipe(BASE)
    assert recipe.variants() == (("", recipe),)
    assert swept("sweep: {}").variants() == (("", recipe),)


def test_every_combination_is_a_variant_and_the_last_key_changes_fastest() -> None:
    recipe = swept("sweep: {parameters.density: [0.1, 0.2], 'models[0].parameters.weight': [1, -0.5]}")
    found = [(name, v.parameters["density"], v.models[0].parameters["weight"]) for name, v in recipe.variants()]
    assert found == [
        ("density=0.1,weight=1", 0.1, 1),
        ("density=0.1,weight=-0.5", 0.1, -0.5),
        ("density=0.2,weight=1", 0.2, 1),
        ("density=0.2,weight=-0.5", 0.2, -0.5),
    ]


def test_a_variant_is_the_recipe_with_its_values_and_sweeps_nothing() -> None:
    recipe = swept("sweep: {merge_method: [linear]}\nseed: 3\nexecution: {workers: 2}")
    ((_, variant),) = recipe.variants()
    same = recipe.model_dump(exclude={"sweep", "merge_method"})
    assert variant.model_dump(exclude={"sweep", "merge_method"}) == same
    assert (variant.merge_method, variant.sweep, variant.directory) == ("linear", {}, recipe.directory)
    assert "sweep" not in variant.to_yaml()


def test_variants_may_be_listed_with_names_or_without() -> None:
    recipe = swept("sweep:\n- {name: sparse, parameters.density: 0.1}\n- {scale: {retention: 0.5}}\n- {name: as_it_is}")
    assert [(name, v.parameters["density"], v.scale) for name, v in recipe.variants()] == [
        ("sparse", 0.1, 1.0),
        ("scale=retention-0.5", 0.5, Retention(retention=0.5)),
        ("as_it_is", 0.5, 1.0),
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("0.30", "density=0.3"),
        ("[0.3, 0.1]", "density=0.3_0.1"),
        ("[{filter: mlp, value: 0.1}, {value: 1}]", "density=filter-mlp_value-0.1_value-1"),
        ("a/b\\c d", "density=a_b_c_d"),
        ("true", "density=true"),
        ("1e-7", "density=1e-07"),
    ],
)
def test_a_name_says_the_value_in_letters_that_are_safe(value: str, name: str) -> None:
    assert names(swept(f"sweep: {{parameters.density: [{value}]}}")) == [name]


def test_keys_that_end_alike_are_named_in_full() -> None:
    recipe = swept("sweep: {'models[0].parameters.weight': [1, 2], 'models[1].parameters.weight': [1], seed: [4]}")
    assert names(recipe) == [
        "models.0.parameters.weight=1,models.1.parameters.weight=1,seed=4",
        "models.0.parameters.weight=2,models.1.parameters.weight=1,seed=4",
    ]


def test_null_takes_a_value_away() -> None:
    recipe = swept("output: {rank: 8}\nsweep: {output.rank: [null, 4]}")
    assert [(name, v.output.rank) for name, v in recipe.variants()] == [("rank=null", None), ("rank=4", 4)]
    assert parse_recipe(recipe.to_yaml()).variants() == recipe.variants()


def test_a_recipe_made_in_python_has_variants_too() -> None:
    recipe = Recipe(merge_method="linear", models=(ModelEntry(model="a"),), sweep={"seed": (1, 2)})
    assert [(name, v.seed) for name, v in recipe.variants()] == [("seed=1", 1), ("seed=2", 2)]


def test_in_memory_adapters_stay_the_objects_they_are() -> None:
    class Adapter:
        state_dict: Mapping[str, Any] = {}
        config: Mapping[str, Any] = {}

    adapter = Adapter()
    recipe = parse_recipe({"merge_method": "linear", "models": [{"model": adapter}], "sweep": {"seed": [1, 2]}})
    assert [v.models[0].model is adapter for _, v in recipe.variants()] == [True, True]


def test_an_override_reaches_all_variants_and_the_sweep_itself(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{BASE}sweep: {{parameters.density: [0.1, 0.2]}}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["seed=7"])
    assert [v.seed for _, v in recipe.variants()] == [7, 7]
    assert names(load_recipe(recipe, ["sweep={seed: [1]}"])) == ["seed=1"]
    with pytest.raises(RecipeError, match=r"^--set sweep={seed: \[-1\]}: seed: expected a whole number"):
        load_recipe(recipe, ["sweep={seed: [-1]}"])


def test_a_swept_value_knows_its_place() -> None:
    recipe = swept("sweep:\n  parameters.density: [0.1, [0.2, 0.3]]\n")
    (_, first), (_, second) = recipe.variants()
    assert first.where(("parameters", "density")) == "r.yaml:7:24"
    assert first.where(("parameters", "density"), key=True) == "r.yaml:7:3"
    assert second.where(("parameters", "density", 1)) == "r.yaml:7:35"
    assert second.where(("models", 1, "model")) == "r.yaml:4:10"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("3", "r.yaml:6:8: sweep: expected a mapping of key paths to lists of values, or a list of variants, found 3"),
        ("", "r.yaml:6:8: sweep: expected a mapping of key paths to lists of values, or a list of variants, found null"),
        ("[]", "r.yaml:6:8: sweep: expected a list with at least one entry, found []"),
        ("[3]", "r.yaml:6:9: sweep[0]: expected a mapping, found 3"),
        ("{parameters.density: 0.5}", "r.yaml:6:29: sweep.'parameters.density': expected a list, found 0.5"),
        ("{parameters.density: []}", "r.yaml:6:29: sweep.'parameters.density': expected a list with at least one entry, found []"),
        ("{parameters..density: [1]}", "r.yaml:6:9: sweep.'parameters..density': expected a key path, such as parameters.density or models[0].parameters.weight, found 'parameters..density'"),
        ("{dtype: [float64]}", "r.yaml:6:9: sweep.dtype: 'dtype' cannot be swept: the inputs, the base model, output.kind, output.shard_size, dtype, extras and execution are the same in all variants; write a second recipe"),
        ("[{dtype: float64}]", "r.yaml:6:10: sweep[0].dtype: 'dtype' cannot be swept"),
        ("{parameters.lambda: [1]}", "r.yaml:6:9: sweep.'parameters.lambda': mergekit's 'lambda' is 'scale' here; sweep scale"),
        ("{parametres.density: [1]}", "r.yaml:6:9: parametres: unknown key 'parametres'; did you mean 'parameters'?"),
        ("[{parametres.density: 1}]", "r.yaml:6:10: parametres: unknown key 'parametres'; did you mean 'parameters'?"),
        ("{output.rnak: [1]}", "r.yaml:6:9: output.rnak: unknown key 'rnak'; did you mean 'rank'?"),
        ("{seed: [1, -1]}", "r.yaml:6:19: seed: expected a whole number between 0 and 2^63 - 1, found -1"),
        ("{'models[7].parameters.weight': [1]}", "r.yaml:6:9: sweep.'models[7].parameters.weight': 'models' has 2 entries, counted from [0]; there is no [7]"),
        ("{parameters: [{density: 1}], parameters.density: [1]}", "sweep.'parameters.density': 'parameters' sets 'parameters.density' as well; keep one of the two"),
        ("{parameters.density: [1], parameters: [{density: 1}]}", "sweep.'parameters.density': 'parameters' sets 'parameters.density' as well; keep one of the two"),
        ("[{}]", "r.yaml:6:9: sweep[0]: this variant changes nothing; give it a key path and a value, or a name to keep the recipe as it is"),
        ("[{name: ../x}]", "r.yaml:6:16: sweep[0].name: expected a name for a directory: at most 120 of the characters A-Z a-z 0-9 _ . , = + -, the first a letter, a digit or _, the last not ., found '../x'"),
        ("[{name: 3}]", "sweep[0].name: expected a name for a directory: at most 120"),
        ("[{name: x.}]", "sweep[0].name: expected a name for a directory: at most 120"),
        ("[{name: sweep.json}]", "r.yaml:6:8: sweep: a variant is called 'sweep.json', which is the list of all variants; choose another name"),
        ("[{name: x}, {name: X}]", "r.yaml:6:8: sweep: 2 variants would be called 'x'; write the sweep as a list of variants, each with a name of its own, or leave out what stands twice"),
        ("{parameters.density: [1, 1]}", "r.yaml:6:8: sweep: 2 variants would be called 'density=1'"),
        (f"{{space: [{'x' * 120}]}}", "r.yaml:6:8: sweep: a variant would be called 'space=xxxxxxx"),
        (f"{{seed: {list(range(101))}, parameters.density: {list(range(10))}}}", "r.yaml:6:8: sweep: 1,010 variants, and at most 1,000 are allowed; sweep fewer values at once"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_told_in_one_sentence(sweep: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        swept(f"sweep: {sweep}")
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "models",
        "models[0]",
        "models[0].model",
        "base_model",
        "output",
        "output.kind",
        "dtype",
        "execution.workers",
        "sweep",
    ],
)
def test_what_variants_share_cannot_be_swept(path: str) -> None:
    with pytest.raises(
        RecipeError,
        match=r"cannot be swept: the inputs, the base model, output\.kind, output\.shard_size, dtype, extras and execution are",
    ):
        swept(f"sweep: {{'{path}': [x]}}")


def test_problems_of_several_variants_are_reported_once_and_together() -> None:
    with pytest.raises(RecipeError) as caught:
        swept("sweep:\n  parameters.weight: [1, x]\n  seed: [1, 2, -1]\n")
    assert [str(problem) for problem in caught.value.problems] == [
        "r.yaml:8:16: seed: expected a whole number between 0 and 2^63 - 1, found -1",
        "r.yaml:7:26: parameters.weight: expected a finite number, found 'x'",
    ]


def test_a_variant_that_contradicts_the_rest_is_refused_where_it_is_swept() -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml:8:23: output\.snap: it says how factors are written"):
        swept("base_model: b\noutput: {kind: model}\nsweep: {output.snap: [vllm]}")


@given(
    st.dictionaries(
        st.sampled_from(["parameters.a", "parameters.b", "models[0].parameters.a", "space", "seed"]),
        st.lists(
            st.text(min_size=1) | st.integers(0, 9) | st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1),
            min_size=1,
            max_size=3,
        ),
        max_size=3,
    )
)
def test_names_are_safe_and_unique_or_refused(sweep: dict[str, Any]) -> None:
    try:
        variants = parse_recipe({"merge_method": "ties", "models": [{"model": "a"}], "sweep": sweep}).variants()
    except RecipeError as error:
        assert all("\n" not in str(problem) for problem in error.problems)  # noqa: PT017
        return
    found = [name.casefold() for name, _ in variants]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[\w.,=+-]*", name, re.ASCII) for name in found)
