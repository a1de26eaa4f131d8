from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lowrank import Registry, plan_variants
from mergekit_lowrank.recipe import parse_recipe
from mergekit_lowrank.recipe.document import read_yaml
from tests.docs.pages import ROOT, Block, blocks, blocks_in

RECIPES = ROOT / "recipes"
SMALL: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "adapters/spam"}, {"model": "adapters/icd10"}],
}


def read(text: str) -> Any:
    return read_yaml(text, locate=lambda line, column: f"{line + 1}:{column + 1}").data


def recipe_in(block: Block) -> dict[str, Any]:
    """The recipe of a block; a fragment is put over a small one."""
    data = read(block.text)
    is_fragment = block.marker == "fragment" or block.argument("equals peft") is not None
    return {**SMALL, **data} if is_fragment else data


def registry_for(block: Block) -> Registry:
    """The built-ins, and the plugins that the block's page writes to files."""
    registry = Registry()
    for other in blocks(block.page):
        name = other.argument("file")
        if name and name.endswith(".py"):
            namespace: dict[str, Any] = {"__name__": Path(name).stem}
            exec(compile(other.text, str(other), "exec"), namespace)
            registry.register(
                type("Plugin", (), {k: staticmethod(v) for k, v in namespace.items() if callable(v)}), name
            )
    return registry


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=str)
def test_a_recipe_in_the_docs_is_planned(block: Block, workplace: Path) -> None:
    recipe = recipe_in(block)
    directory = RECIPES if "adapters/" in str(recipe["models"]) else workplace
    for table in blocks(block.page):
        if table.language == "csv":
            (workplace / str(table.argument("file"))).write_text(table.text)
    checked = parse_recipe(recipe, directory=directory)
    plans = plan_variants(checked, registry=registry_for(block))
    for made in plans.values():
        assert len(made.inputs) == len(recipe["models"])
        assert made.warnings == ()
