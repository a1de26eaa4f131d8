from __future__ import annotations

from mergekit_lowrank.engine.settings import filter_warnings
from mergekit_lowrank.recipe import parse_recipe


def filters(*names: str) -> list[dict[str, object]]:
    return [{"filter": name, "value": 1} for name in names]


def test_filters_that_take_no_module_are_warned_about_by_parameter() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "ties",
            "models": [{"model": "a", "parameters": {"weight": filters("q_prj", "mlp")}}, {"model": "b"}],
            "parameters": {"density": 0.5, "k": filters("a", "b", "c", "d", "e")},
            "rules": [{"match": "q", "parameters": {"density": filters("q_proj", "*")}}],
        }
    )
    why = "take no module of the inputs: none matches, or filters before them take it"
    assert list(filter_warnings(recipe, ["0.q_proj", "0.mlp"])) == [
        f"parameters.k: the filters 'a', 'b', 'c' and 2 more {why}",
        f"models[0].parameters.weight: the filters 'q_prj' {why}",
    ]
