"""Every recipe that is shipped plans, and the quickstart merges the bundled adapters."""

from pathlib import Path

import pytest

from mergekit_lowrank import Registry, load_recipe, merge, plan

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_plans_without_a_warning(path) -> None:
    made = plan(path, strict=True)
    assert len(made.modules) == 36
    assert made.warnings == ()


def test_every_method_has_a_recipe_of_its_own() -> None:
    shown = {load_recipe(path).merge_method for path in RECIPES.glob("*.yaml")}
    assert set(Registry().methods) <= shown


def test_the_quickstart_merges_real_adapters(tmp_path) -> None:
    report = merge(RECIPES / "quickstart.yaml", tmp_path / "out")
    assert (report.method, report.totals.modules, report.rank, report.dtype) == ("robustmerge", 36, 16, "bfloat16")
    for module in report.modules:
        assert module["retention"] == pytest.approx(3**-0.4, rel=0.02)
