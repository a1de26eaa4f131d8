# ruff: noqa: E501 (one case a line)
from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe import (
    Budget,
    Energy,
    ErrorBound,
    Execution,
    Filtered,
    ModelEntry,
    Output,
    Recipe,
    Retention,
    Rule,
    load_recipe,
    parse_recipe,
    recipe_schema,
)


@dataclass(frozen=True)
class Adapter:
    state_dict: Mapping[str, Any]
    config: Mapping[str, Any]


def minimal(**keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "a"}], **keys}


def test_defaults() -> None:
    recipe = parse_recipe(minimal())
    assert recipe == Recipe(merge_method="linear", models=(ModelEntry(model="a"),))
    assert (recipe.parameters, recipe.space, recipe.scale, recipe.rules) == ({}, None, 1.0, ())
    assert recipe.output == Output(
        kind="adapter", rank=None, uniform_rank=True, snap=None, balance=False, shard_size=None
    )
    assert recipe.execution == Execution(memory=None, vram=None, device=None, executor=None, workers=None)
    assert recipe.sweep == {}
    assert recipe.canonical is None
    assert (recipe.dtype, recipe.out_dtype, recipe.missing, recipe.base_model, recipe.seed) == (
        "float32", None, "zero", None, 0,
    )  # fmt: skip


def test_values_keep_their_kind() -> None:
    value = [{"filter": "q", "value": [0, 1]}, {"value": 2}]
    recipe = parse_recipe(minimal(parameters={"i": 3, "f": 0.5, "b": True, "s": "sum", "g": [0, 1], "v": value}))
    assert {key: (type(v), v) for key, v in recipe.parameters.items()} == {
        "i": (int, 3),
        "f": (float, 0.5),
        "b": (bool, True),
        "s": (str, "sum"),
        "g": (tuple, (0.0, 1.0)),
        "v": (tuple, (Filtered(filter="q", value=(0.0, 1.0)), Filtered(value=2))),
    }


@pytest.mark.parametrize(
    ("scale", "expected"), [(-2, -2.0), (0, 0.0), ("auto", "auto"), ({"retention": 0.5}, Retention(retention=0.5))]
)
def test_a_scale_is_a_number_auto_or_a_retention(scale: object, expected: object) -> None:
    assert parse_recipe(minimal(scale=scale)).scale == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("max", "max"),
        ("sum", "sum"),
        (1, 1),
        ({"energy": 1}, Energy(energy=1.0)),
        ({"error": 1e-8}, ErrorBound(error=1e-8)),
        (None, None),
    ],
)
def test_a_rank_is_a_word_a_number_an_energy_or_an_error(rank: object, expected: object) -> None:
    assert parse_recipe(minimal(output={"rank": rank})).output.rank == expected


@pytest.mark.parametrize(("size", "count"), [("80MB", 80_000_000), ("1.5 KiB", 1536), (4096, 4096), ("4096", 4096)])
def test_a_budget_is_a_number_of_bytes_with_or_without_a_unit(size: object, count: int) -> None:
    rank = parse_recipe(minimal(output={"rank": {"budget": size}, "uniform_rank": False})).output.rank
    assert isinstance(rank, Budget)
    assert rank.bytes == count


@pytest.mark.parametrize(("snap", "expected"), [("vllm", "vllm"), ([8, 16], (8, 16)), ([1], (1,)), (None, None)])
def test_ranks_snap_to_those_of_vllm_or_a_list(snap: object, expected: object) -> None:
    assert parse_recipe(minimal(output={"snap": snap})).output.snap == expected


def test_execution_gives_numbers_of_bytes() -> None:
    execution = parse_recipe(minimal(execution={"memory": "2GiB", "vram": 4096, "device": "cuda:1"})).execution
    assert (execution.memory_bytes, execution.vram_bytes, execution.device) == (2 << 30, 4096, "cuda:1")
    assert (execution.executor, execution.workers) == (None, None)
    assert Execution().memory_bytes is None


def test_a_model_has_files_of_a_size() -> None:
    output = parse_recipe(minimal(base_model="b", output={"kind": "model", "shard_size": "5GB"})).output
    assert (output.shard_bytes, output.rank) == (5_000_000_000, None)
    assert Output().shard_bytes is None


@pytest.mark.parametrize("rank", ["max", "sum", 8, {"energy": 0.9}, {"error": 0.1}])
def test_a_model_may_ask_for_a_rank(rank: object) -> None:
    assert parse_recipe(minimal(base_model="b", output={"kind": "model", "rank": rank})).output.rank is not None


def test_what_says_nothing_may_stand_in_either_kind() -> None:
    parse_recipe(minimal(base_model="b", output={"kind": "model", "snap": None}))
    parse_recipe(minimal(output={"kind": "adapter", "shard_size": None}))


def test_a_size_that_is_none_is_told_with_its_place() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\noutput:\n  uniform_rank: false\n  rank: {budget: 80 megs}\n"
    with pytest.raises(
        RecipeError, match=r"^r\.yaml:5:9: output\.rank: expected .*\{budget: SIZE\} with a size such as"
    ):
        parse_recipe(text, name="r.yaml")


def test_a_budget_in_one_rank_for_all_is_refused_with_its_place() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\noutput:\n  rank: {budget: 80MB}\n"
    with pytest.raises(RecipeError, match=r"^r\.yaml:4:9: output\.rank: a budget gives .*; add uniform_rank: false"):
        parse_recipe(text, name="r.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": []}, r"models: expected a list with at least one entry, found \[\]"),
        ({"models": None}, "models: expected a list, found null"),
        ({"models": "a"}, "models: expected a list, found 'a'"),
        ({"models": ["a"]}, r"models\[0\]: expected a mapping, found 'a'"),
        ({"models": [{}]}, r"models\[0\].model: missing key 'model'"),
        ({"models": [{"model": ""}]}, r"models\[0\].model: expected a path, a Hugging Face id such as 'org/name', or an "),
        ({"models": [{"model": 3}]}, r"models\[0\].model: expected a path, .*, found 3"),
        ({"models": [{"model": "a", "weight": 1}]}, r"models\[0\].weight: unknown key 'weight'; write it under 'parameters'"),
        ({"models": [{"modle": "a", "model": "a"}]}, r"unknown key 'modle'; did you mean 'model'\?"),
        ({"merge_method": ""}, "merge_method: expected text that is not empty, found ''"),
        ({"merge_method": None}, "merge_method: expected text that is not empty, found null"),
        ({"merge_method": "passthrough"}, "merge_method: 'passthrough' copies layers and merges nothing"),
        ({"parameters": None}, "parameters: expected a mapping, found null"),
        ({"parameters": {3: 1}}, r"parameters\[3\]: expected text, found 3"),
        ({3: 1}, "expected text as a key, found"),
        ({"parameters": {"d": None}}, "parameters.d: expected a finite number, text, true, false or a list .*, found null"),
        ({"parameters": {"d": float("nan")}}, "parameters.d: expected a finite number, text, .*, found nan"),
        ({"parameters": {"d": float("inf")}}, "parameters.d: expected a finite number, text, .*, found inf"),
        ({"parameters": {"d": {"value": 1}}}, "parameters.d: expected a finite number, text, .*, found {'value': 1}"),
        ({"parameters": {"d": []}}, r"parameters.d: expected a list with at least one entry, found \[\]"),
        ({"parameters": {"d": [0, "x"]}}, r"parameters.d\[1\]: expected a finite number, found 'x'"),
        ({"parameters": {"d": [0, True]}}, r"parameters.d\[1\]: expected a finite number, found true"),
        ({"parameters": {"d": [0, [1]]}}, r"parameters.d\[1\]: expected a finite number, found \[1\]"),
        ({"parameters": {"d": [{"value": 1}, 2]}}, r"parameters.d\[1\]: expected a mapping, found 2"),
        ({"parameters": {"d": [{"filter": "q"}]}}, r"parameters.d\[0\].value: missing key 'value'"),
        ({"parameters": {"d": [{"filtre": "q", "value": 1}]}}, r"d\[0\].filtre: unknown key 'filtre'; did you mean 'filter'\?"),
        ({"parameters": {"d": [{"filter": "", "value": 1}]}}, r"d\[0\].filter: expected text that is not empty, found ''"),
        ({"parameters": {"d": [{"value": [{"value": 1}]}]}}, r"d\[0\].value\[0\]: expected a finite number, found {'value': 1}"),
        (
            {"parameters": {"d": [{"filter": "*", "value": 1}, {"filter": "q", "value": 1}]}},
            r"parameters.d\[0\]: this entry takes every module, so the entries after it never apply; put it last",
        ),
        (
            {"parameters": {"d": [{"filter": "regex:(", "value": 1}]}},
            r"d\[0\].filter: '\(' is not a regular expression: missing \)",
        ),
        ({"rules": [{"match": "regex:[[a]", "rank": 1}]}, "'.*' is not a regular expression: Possible nested set"),
        ({"rules": [{"match": "glob:", "rank": 1}]}, r"rules\[0\].match: expected a pattern after 'glob:', found 'glob:'"),
        ({"rules": [{"match": "q"}]}, r"rules\[0\]: this rule changes nothing; add merge_method, parameters, space, "),
        ({"rules": [{"rank": 1}]}, r"rules\[0\].match: missing key 'match'"),
        ({"rules": [{"match": "q", "rank": 0}]}, r"rules\[0\].rank: expected 'max', 'sum', a whole number .*, found 0"),
        ({"rules": [{"match": "q", "output": {}}]}, r"rules\[0\].output: unknown key 'output'; the keys here are match, "),
        ({"parameters": {"weight": "a"}}, "parameters.weight: expected a finite number, found 'a'"),
        ({"parameters": {"weight": [{"value": True}]}}, r"parameters.weight\[0\].value: expected a finite number, found true"),
        ({"parameters": {"int8_mask": True}}, "parameters.int8_mask: 'int8_mask' is not a parameter here; leave it out"),
        ({"models": [{"model": "a", "parameters": {"lambda": 1}}]}, "'lambda' is not a parameter here; write 'scale'"),
        ({"scale": True}, "scale: expected a finite number, 'auto', or {retention: k} with 0 < k <= 10, found true"),
        ({"scale": "auot"}, r"scale: .* \(did you mean 'auto'\?\), found 'auot'"),
        ({"scale": {"retention": 0}}, "scale: expected .*, found {'retention': 0}"),
        ({"scale": {"retention": 11}}, "scale: expected .*, found {'retention': 11}"),
        ({"scale": float("inf")}, "scale: expected .*, found inf"),
        ({"output": {"rank": 0}}, "output.rank: expected 'max', 'sum', a whole number of at least 1, {energy: e} with"),
        ({"output": {"rank": 8.0}}, "output.rank: expected .*, found 8.0"),
        ({"output": {"rank": "mx"}}, r"output.rank: .* \(did you mean 'max'\?\), found 'mx'"),
        ({"output": {"rank": {"energy": 1.5}}}, "output.rank: expected .*, found {'energy': 1.5}"),
        ({"output": {"rank": {"error": 0}}}, "output.rank: expected .*{error: e} with 0 < e < 1.*, found {'error': 0}"),
        ({"output": {"rank": {"error": 1}}}, "output.rank: expected .*, found {'error': 1}"),
        ({"output": {"rank": {"error": -0.1}}}, "output.rank: expected .*, found {'error': -0.1}"),
        ({"output": {"rank": {"budget": 0}, "uniform_rank": False}}, "output.rank: expected .*, found {'budget': 0}"),
        ({"output": {"rank": {"budget": -1}, "uniform_rank": False}}, "output.rank: expected .*, found {'budget': -1}"),
        ({"output": {"rank": {"budget": True}, "uniform_rank": False}}, "output.rank: expected .*, found {'budget': True}"),
        ({"output": {"rank": {"energy": 0.9, "error": 0.1}}}, "output.rank: expected .*, found {'energy': 0.9, 'error': 0.1}"),
        ({"output": {"rank": {"budget": "8MB"}}}, "output.rank: a budget gives every module a rank of its own; add uniform_rank"),
        ({"rules": [{"match": "q", "rank": {"budget": "8MB"}}]}, r"rules\[0\].rank: expected .* \(a budget is for all modules"),
        (
            {"output": {"rank": {"budget": "8MB"}, "uniform_rank": False}, "rules": [{"match": "q", "rank": {"error": 0.1}}]},
            r"rules\[0\].rank: beside a budget the rank of a rule must be known beforehand: max, sum or a number",
        ),
        ({"output": {"snap": "vlm"}}, r"output.snap: expected 'vllm', or a list .* \(did you mean 'vllm'\?\), found 'vlm'"),
        ({"output": {"snap": []}}, r"output.snap: expected 'vllm', or a list of whole numbers of at least 1, found \[\]"),
        ({"output": {"snap": [0, 8]}}, r"output.snap: expected .*, found \[0, 8\]"),
        ({"output": {"snap": 8}}, "output.snap: expected .*, found 8"),
        ({"output": {"snap": [8, 16, 16]}}, r"output.snap\[2\]: expected ranks in ascending order, so one above 16, found 16"),
        ({"output": {"balance": 1}}, "output.balance: expected true or false, found 1"),
        ({"canonical": "SVD"}, "canonical: expected 'svd', found 'SVD'"),
        ({"canonical": True}, "canonical: expected 'svd', found true"),
        ({"output": {"uniform_rank": 1}}, "output.uniform_rank: expected true or false, found 1"),
        ({"output": 8}, "output: expected a mapping, found 8"),
        ({"dtype": "bfloat16"}, "dtype: expected 'float32' or 'float64', the type computed in; .* 'out_dtype: bfloat16', found"),
        ({"out_dtype": "fp16"}, "out_dtype: expected 'float16', 'bfloat16', 'float32' or 'float64'"),
        ({"missing": "zeros"}, r"missing: expected 'zero', 'present' or 'error' \(did you mean 'zero'\?\), found 'zeros'"),
        ({"seed": -1}, r"seed: expected a whole number between 0 and 2\^63 - 1, found -1"),
        ({"seed": 1.0}, "seed: expected a whole number .*, found 1.0"),
        ({"space": ""}, "space: expected text that is not empty, found ''"),
        ({"modles": []}, r"modles: unknown key 'modles'; did you mean 'models'\?"),
        ({"zzz": 1}, "unknown key 'zzz'; the keys here are merge_method, models, parameters,"),
        ({"a\nb": 1}, r"recipe: 'a\\nb': unknown key 'a\\nb'"),
        ({"slices": []}, "slices: unknown key 'slices'; modules are merged by name; to treat layers differently use"),
        ({"modules": {}}, "unknown key 'modules'; use 'rules'"),
        ({"tokenizer": {}}, "unknown key 'tokenizer'; write tokenizer_source: base, or a model of the recipe"),
        ({"chat_template": "auto"}, "unknown key 'chat_template'; it goes with the tokenizer"),
        ({"int8_mask": True}, "unknown key 'int8_mask'; leave it out"),
        ({"out_shard_size": "5B"}, "unknown key 'out_shard_size'; write 'shard_size' under 'output', beside kind: model"),
        ({"kind": "model"}, "kind: unknown key 'kind'; write it under 'output'"),
        ({"shard_size": "5GB"}, "shard_size: unknown key 'shard_size'; write it under 'output'"),
        ({"memory": "2GiB"}, "memory: unknown key 'memory'; write it under 'execution'"),
        ({"workers": 2}, "workers: unknown key 'workers'; write it under 'execution'"),
        ({"output": {"kind": "modle"}}, r"output.kind: expected 'adapter' or 'model' \(did you mean 'model'\?\), found 'modle'"),
        ({"output": {"kind": "model"}}, "output.kind: the merged update is added to a base model; name its directory under base_model"),
        ({"output": {"format": "model"}}, "output.format: a model is a kind of output, no dialect .*; write kind: model"),
        ({"output": {"shard_size": "5GB"}}, "output.shard_size: an adapter is one file; leave it out, or write kind: model"),
        ({"base_model": "b", "output": {"kind": "model", "snap": "vllm"}}, "output.snap: it says how factors are written, and a"),
        ({"base_model": "b", "output": {"kind": "model", "balance": False}}, "output.balance: it says how factors .*; leave it out"),
        ({"base_model": "b", "output": {"kind": "model", "uniform_rank": True}}, "output.uniform_rank: it says how factors are"),
        ({"base_model": "b", "output": {"kind": "model", "rank": {"budget": 9}}}, "output.rank: a budget is for the factors of an"),
        (
            {"base_model": "b", "output": {"kind": "model", "shard_size": "5 gigs"}},
            "output.shard_size: expected an amount of memory with a unit, such as 2GiB, found '5 gigs'",
        ),
        ({"execution": []}, r"execution: expected a mapping, found \[\]"),
        ({"execution": {"memroy": 1}}, r"execution.memroy: unknown key 'memroy'; did you mean 'memory'\?"),
        ({"execution": {"zzz": 1}}, "unknown key 'zzz'; the keys here are memory, vram, device, executor, workers"),
        ({"execution": {"memory": "much"}}, "execution.memory: expected an amount of memory with a unit, such as 2GiB, found 'much'"),
        ({"execution": {"memory": True}}, "execution.memory: expected an amount of memory .*, found true"),
        ({"execution": {"memory": 0}}, "execution.memory: expected an amount of memory .*, found 0"),
        ({"execution": {"vram": 1.5}}, "execution.vram: expected an amount of memory .*, found 1.5"),
        ({"execution": {"device": "gpu"}}, r"execution.device: expected 'auto', 'cpu', 'cuda' \(all GPUs\), 'cuda:N' .*, found 'gpu'"),
        ({"execution": {"device": "cuda:x"}}, "execution.device: expected 'auto', .*, found 'cuda:x'"),
        ({"execution": {"executor": ""}}, "execution.executor: expected text that is not empty, found ''"),
        ({"execution": {"workers": 0}}, "execution.workers: expected a whole number of at least 1, found 0"),
        ({"execution": {"workers": True}}, "execution.workers: expected a whole number of at least 1, found true"),
        ({"rank": 8}, "unknown key 'rank'; write it under 'output'"),
        ({"lambda": 8}, "unknown key 'lambda'; write 'scale'"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_told_in_one_sentence(keys: dict[Any, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(minimal() | keys)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_a_long_value_is_shortened_in_errors() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(minimal(scale="x" * 10_000))
    assert len(str(caught.value)) < 250


def test_what_shows_itself_badly_still_gives_an_error() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise ValueError

    with pytest.raises(RecipeError, match=r"scale: expected .*, found <Rude instance at"):
        parse_recipe(minimal(scale=Rude()))


def test_a_model_may_be_an_in_memory_adapter() -> None:
    adapter = Adapter({}, {})
    recipe = parse_recipe(minimal(models=[{"model": adapter}]))
    assert recipe.models[0].model is adapter
    assert 'model: "<in-memory adapter>"' in recipe.to_yaml()


def test_overrides_leave_in_memory_adapters_as_they_are() -> None:
    adapter = Adapter({}, {})
    recipe = load_recipe(parse_recipe(minimal(models=[{"model": adapter}])), ["scale=2"])
    assert recipe.models[0].model is adapter
    assert recipe.scale == 2.0


def test_an_adapter_whose_state_dict_is_a_method_is_refused() -> None:
    class Model:
        config: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(
        RecipeError, match="expected an in-memory adapter whose 'state_dict' is a mapping of names to tensors"
    ):
        parse_recipe(minimal(models=[{"model": Model()}]))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        parse_recipe(minimal()).seed = 3  # type: ignore[misc]


number = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(min_size=1, max_size=8)
scalar = st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | number | st.text(max_size=8)
graded = scalar | st.lists(number, min_size=1, max_size=3)
filters = st.lists(st.fixed_dictionaries({"filter": text.map("a{}".format), "value": graded}), min_size=1, max_size=3)
parameters = st.dictionaries(text.map("p{}".format), graded | filters, max_size=3)
scale = number | st.just("auto") | st.builds(dict, retention=st.floats(0.001, 10))
rank = (
    st.sampled_from(["max", "sum"])
    | st.integers(min_value=1)
    | st.builds(dict, energy=st.floats(0.001, 1))
    | st.builds(dict, error=st.floats(0, 1, exclude_min=True, exclude_max=True))
)
snap = st.just("vllm") | st.lists(st.integers(min_value=1), min_size=1, max_size=3, unique=True).map(sorted)
form = {"snap": snap, "balance": st.booleans()}
size = st.just("1.5GiB") | st.integers(1, 2**40)
output = (
    st.fixed_dictionaries({"rank": rank}, optional={"uniform_rank": st.booleans(), **form})
    | st.fixed_dictionaries(
        {"rank": st.builds(dict, budget=size), "uniform_rank": st.just(False)},
        optional=form,
    )
    | st.fixed_dictionaries({"kind": st.just("model")}, optional={"rank": rank, "shard_size": size})
)
execution = st.fixed_dictionaries(
    {},
    optional={
        "memory": size,
        "vram": size,
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"]),
        "executor": text,
        "workers": st.integers(min_value=1),
    },
)
sweep = st.just({}) | st.fixed_dictionaries(
    {"seed": st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3, unique=True)},
    optional={
        "missing": st.just(["zero", "error"]),
        "output.rank": st.just([None, 8]),
        "models[0].parameters.weight": st.just([1.5, [0.5, 1.0], [{"filter": "q", "value": -1}]]),
    },
)
rule = st.fixed_dictionaries(
    {"match": text.map("a{}".format), "rank": rank},
    optional={"parameters": parameters, "scale": scale, "space": text, "merge_method": text.map("m{}".format)},
)
recipes = st.fixed_dictionaries(
    {
        "merge_method": text.map("m{}".format),
        "models": st.lists(
            st.fixed_dictionaries({"model": text}, optional={"parameters": parameters}), min_size=1, max_size=3
        ),
    },
    optional={
        "parameters": parameters,
        "space": text,
        "scale": scale,
        "canonical": st.just("svd"),
        "output": output,
        "dtype": st.sampled_from(["float32", "float64"]),
        "out_dtype": st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
        "missing": st.sampled_from(["zero", "present", "error"]),
        "rules": st.lists(rule, max_size=2),
        "base_model": text,
        "seed": st.integers(0, 2**63 - 1),
        "execution": execution,
        "sweep": sweep,
    },
)


def is_consistent(data: dict[str, Any]) -> bool:
    ranks = [rule["rank"] for rule in data.get("rules", ())]
    has_budget = "budget" in str(data.get("output"))
    has_base = "base_model" in data or data.get("output", {}).get("kind") != "model"
    return (
        has_base
        and not (has_budget and any(isinstance(rank, dict) for rank in ranks))
        and not (has_budget and "uniform_rank" not in data["output"])
    )


@given(recipes.filter(is_consistent))
def test_written_yaml_parses_to_the_same_recipe(data: dict[str, Any]) -> None:
    recipe = parse_recipe(data)
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.variants() == recipe.variants()


def test_written_yaml_holds_the_defaults_in_the_usual_order() -> None:
    recipe = parse_recipe({"models": [{"parameters": {"weight": [0, 1]}, "model": "a"}], "merge_method": "ties"})
    assert recipe.to_yaml() == (
        "merge_method: ties\nmodels:\n- model: a\n  parameters:\n    weight: [0.0, 1.0]\nscale: 1.0\n"
        "output: {kind: adapter, uniform_rank: true, balance: false, format: peft}\ndtype: float32\nmissing: zero\n"
        "extras: error\nseed: 0\n"
    )


def test_two_recipes_that_say_the_same_are_equal_wherever_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("{merge_method: linear, models: [{model: a}]}")
    assert load_recipe(tmp_path / "r.yaml") == parse_recipe(minimal())


def test_the_schema_describes_every_key_and_knows_models_as_text_only() -> None:
    schema = recipe_schema()
    definitions = [schema, *schema["$defs"].values()]
    assert all("description" in field for part in definitions for field in part["properties"].values())
    assert all(part["additionalProperties"] is False for part in definitions)
    assert schema["required"] == ["merge_method", "models"]
    assert schema["$defs"]["ModelEntry"]["properties"]["model"]["type"] == "string"


def test_a_rule_may_be_built_in_python() -> None:
    assert Rule(match="q", rank=Energy(energy=0.9)).rank == Energy(energy=0.9)


def test_the_room_does_not_import_torch() -> None:
    code = "import sys, mergekit_lowrank.recipe; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
