"""Output ranks as planned: the method's own, snapped ones, and budgets."""

import pytest

from mergekit_lowrank import Preset, RecipeError, Registry, hookimpl, plan
from mergekit_lowrank.recipe import parse_recipe
from mergekit_lowrank.strategies import Linear
from mergekit_lowrank.testing import write_tiny_adapter
from tests.engine.makers import MODULES, adapters, recipe_of

Q0, DOWN, Q1, Q2 = MODULES
ENTRIES = sum(d_out + d_in for d_out, d_in in MODULES.values())


def ranks_of(made):
    return {module.name: module.rank.planned for module in made.modules}


def written(made):
    return {module.name: made.written_rank(module) for module in made.modules}


@pytest.fixture
def paths(tmp_path):
    """Ranks 3 and 2."""
    large = write_tiny_adapter(tmp_path / "r3", MODULES, rank=3, seed=1)
    return [str(large), str(write_tiny_adapter(tmp_path / "r2", MODULES, rank=2, seed=2))]


@pytest.fixture
def registry():
    class Plugin:
        @hookimpl
        def strategies(self):
            return [Preset("whole", Linear, "keeps all", rank="sum")]

    registry = Registry()
    registry.register(Plugin(), "whole")
    return registry


class TestDefault:
    def test_a_method_may_have_a_default_of_its_own(self, paths, registry) -> None:
        assert plan(recipe_of(paths), registry=registry).uniform_rank == 3
        assert plan(recipe_of(paths, "whole"), registry=registry).uniform_rank == 5
        assert plan(recipe_of(paths, "whole", output={"rank": "max"}), registry=registry).uniform_rank == 3

    def test_a_rule_with_another_method_has_the_default_of_that(self, paths, registry) -> None:
        rules = [{"match": "down_proj", "merge_method": "whole"}]
        made = plan(recipe_of(paths, rules=rules, output={"uniform_rank": False}), registry=registry)
        assert ranks_of(made) == {Q0: 3, Q1: 3, Q2: 3, DOWN: 5}

    def test_a_rank_of_the_recipe_wins_over_that_of_a_rules_method(self, paths, registry) -> None:
        rules = [{"match": "down_proj", "merge_method": "whole"}]
        made = plan(recipe_of(paths, rules=rules, output={"rank": 2, "uniform_rank": False}), registry=registry)
        assert set(ranks_of(made).values()) == {2}


class TestSnap:
    @pytest.mark.parametrize(
        ("asked", "snap", "used", "rank"),
        [
            ("max", "vllm", 8, 8),
            ("sum", [2, 6], 6, 6),
            (6, [6], 6, 6),
            (9, "vllm", 10, 16),
            (1, "vllm", 1, 1),
            (99, "vllm", 10, 16),
        ],
    )
    def test_the_one_rank_is_raised_and_used(self, paths, asked, snap, used, rank) -> None:
        made = plan(recipe_of(paths, output={"rank": asked, "snap": snap}))
        assert made.uniform_rank == rank
        assert set(ranks_of(made).values()) == {used}  # no module has more than 10 directions
        assert made.bytes_written == rank * ENTRIES * 4

    def test_a_rule_below_the_one_rank_stays_below(self, paths) -> None:
        made = plan(recipe_of(paths, output={"snap": "vllm"}, rules=[{"match": "down_proj", "rank": 2}]))
        assert ranks_of(made) == {Q0: 8, Q1: 8, Q2: 8, DOWN: 2}
        assert set(written(made).values()) == {8}

    def test_every_rank_is_raised_where_they_differ(self, paths) -> None:
        output = {"snap": [1, 4, 9], "uniform_rank": False}
        made = plan(recipe_of(paths, output=output, rules=[{"match": "down_proj", "rank": 5}]))
        assert ranks_of(made) == written(made) == {Q0: 4, Q1: 4, Q2: 4, DOWN: 9}

    def test_a_rank_above_every_accepted_one_is_refused_with_its_place(self, paths) -> None:
        text = parse_recipe(recipe_of(paths, output={"rank": "sum"})).to_yaml()
        recipe = parse_recipe(text.replace("rank: sum,", "rank: sum, snap: [2, 4],"), name="r.yaml")
        with pytest.raises(RecipeError) as caught:
            plan(recipe)
        line = 1 + text[: text.index("output:")].count("\n")
        assert str(caught.value).startswith(f"r.yaml:{line}:")
        assert f"output.snap: module '{DOWN}' (and 3 more modules) has rank 5" in str(caught.value)
        assert "the largest accepted rank is 4; set output.rank to 4 or less, or leave snap out" in str(caught.value)

    def test_a_rank_that_depends_on_the_data_is_not_judged_yet(self, paths) -> None:
        made = plan(recipe_of(paths, output={"rank": {"energy": 0.9}, "snap": [1]}))
        assert (made.uniform_rank, made.bytes_written) == (None, None)


class TestBudget:
    def output(self, size, **keys):
        return {"rank": {"budget": size}, "uniform_rank": False, **keys}

    def test_a_budget_is_known_and_the_ranks_are_not(self, paths) -> None:
        made = plan(recipe_of(paths, output=self.output("1kB")))
        assert (made.budget_bytes, made.bytes_written, made.uniform_rank) == (1000, None, None)
        assert set(ranks_of(made).values()) == {None}
        data = made.to_dict()
        assert {module["rank_policy"] for module in data["modules"]} == {"budget"}
        assert data["totals"]["budget_bytes"] == 1000

    def test_without_one_there_is_no_budget(self, paths) -> None:
        assert plan(recipe_of(paths)).budget_bytes is None

    def test_one_direction_in_every_module_is_the_least(self, paths) -> None:
        assert plan(recipe_of(paths, output=self.output(4 * ENTRIES))).budget_bytes == 4 * ENTRIES
        with pytest.raises(RecipeError, match=r"output\.rank: 367 bytes are too few: rank 1 in every module") as caught:
            plan(recipe_of(paths, output=self.output(4 * ENTRIES - 1)))
        assert "takes 368; give at least that" in str(caught.value)

    def test_the_least_counts_the_stored_type(self, paths) -> None:
        assert plan(recipe_of(paths, output=self.output(2 * ENTRIES), out_dtype="bfloat16")).budget_bytes == 2 * ENTRIES

    def test_the_least_counts_rules_and_accepted_ranks(self, paths) -> None:
        rules = [{"match": "down_proj", "rank": 3}]
        least = 4 * (2 * (12 + 10) * 3 + 4 * (10 + 16))
        output = self.output(least - 1, snap=[2, 4])
        with pytest.raises(RecipeError, match=rf"rank 2 in every module \(or what a rule gives it\) takes {least};"):
            plan(recipe_of(paths, output=output, rules=rules))

    def test_all_problems_are_told_together(self, paths) -> None:
        rules = [{"match": "k_proj", "rank": 3}]
        with pytest.raises(RecipeError) as caught:
            plan(recipe_of(paths, output=self.output(10), rules=rules))
        assert len(caught.value.problems) == 2


@pytest.mark.parametrize("keys", [{"canonical": "svd"}, {"output": {"balance": True}}])
def test_canonical_factors_are_in_the_memory_of_the_plan(tmp_path, keys) -> None:
    paths = adapters(tmp_path)
    assert plan(recipe_of(paths, **keys)).peak_bytes > plan(recipe_of(paths)).peak_bytes


@pytest.mark.parametrize(
    ("rank", "name"), [("max", "number"), (2, "number"), ({"energy": 0.9}, "energy"), ({"error": 0.1}, "error")]
)
def test_the_plan_names_what_decides_a_rank(tmp_path, rank, name) -> None:
    made = plan(recipe_of(adapters(tmp_path), output={"rank": rank}))
    assert {module["rank_policy"] for module in made.to_dict()["modules"]} == {name}
