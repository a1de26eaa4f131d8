"""The plan finds every problem before a tensor is read."""

import json

import pytest
import torch

from mergekit_lowrank import (
    IncompatibleInputsError,
    MemoryBudgetError,
    MergeError,
    RecipeError,
    Registry,
    StrategyError,
    plan,
)
from mergekit_lowrank.formats import PeftCheckpoint
from mergekit_lowrank.testing import write_tiny_adapter
from tests.engine.makers import MODULES, adapters, recipe_of

Q0, DOWN, Q1, Q2 = MODULES


def by_name(made):
    return {module.name: module for module in made.modules}


def test_planning_reads_no_tensor(tmp_path, monkeypatch) -> None:
    def read(self, module):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(PeftCheckpoint, "read", read)
    made = plan(recipe_of(adapters(tmp_path)))
    assert [module.name for module in made.modules] == sorted(MODULES)


def test_totals_are_those_of_the_files(tmp_path) -> None:
    made = plan(recipe_of(adapters(tmp_path, rank=2)))
    entries = sum(2 * (d_out + d_in) for d_out, d_in in MODULES.values())
    assert made.bytes_read == 2 * 4 * entries
    assert made.bytes_written == 4 * entries
    assert made.peak_bytes == max(module.peak_bytes for module in made.modules)


def test_the_plan_is_plain_data_for_json(tmp_path) -> None:
    data = json.loads(json.dumps(plan(recipe_of(adapters(tmp_path), "ties")).to_dict()))
    assert data["modules"][0]["space"] == "delta"
    assert data["totals"]["modules"] == len(MODULES)


def test_shapes_that_differ_name_module_inputs_and_sizes(tmp_path) -> None:
    paths = [*adapters(tmp_path), str(write_tiny_adapter(tmp_path / "other", {**MODULES, Q0: (12, 7)}, seed=5))]
    with pytest.raises(
        IncompatibleInputsError, match=r"'model.layers.0.self_attn.q_proj': 'adapter1' has d_out=12, d_in=10, 'other' "
    ):
        plan(recipe_of(paths))


def test_an_input_without_a_shared_module_is_refused(tmp_path) -> None:
    paths = [*adapters(tmp_path), str(write_tiny_adapter(tmp_path / "alien", {"h.0.attn": (4, 4)}))]
    with pytest.raises(
        IncompatibleInputsError, match=r"'alien' shares no module with the other inputs: it has 'h\.0\.attn'"
    ):
        plan(recipe_of(paths))


def test_all_problems_are_reported_together(tmp_path) -> None:
    recipe = recipe_of(adapters(tmp_path), "tise", rules=[{"match": "q_proj", "space": "nowhere"}])
    recipe["rules"].append({"match": "x", "merge_method": "linaer"})
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    assert len(caught.value.problems) == 2
    assert "did you mean 'ties'" in str(caught.value)
    assert "did you mean 'linear'" in str(caught.value)


def test_unreadable_inputs_are_collected(tmp_path) -> None:
    (good,) = adapters(tmp_path, 1)
    with pytest.raises(MergeError) as caught:
        plan(recipe_of([good, str(tmp_path / "nowhere"), str(tmp_path / "neither")]))
    assert len(caught.value.problems) == 2


class TestParameters:
    def test_an_unknown_parameter_names_the_nearest(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match="'ties' has no parameter 'densty'; did you mean 'density'"):
            plan(recipe_of(adapters(tmp_path), "ties", parameters={"densty": 0.5}))

    def test_a_value_out_of_range_says_what_was_expected(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match=r"parameters\.density: expected less than or equal to 1, found 7"):
            plan(recipe_of(adapters(tmp_path), "ties", parameters={"density": 7}))

    def test_each_point_of_a_gradient_is_checked(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match=r"parameters.density\[1\]: expected greater than or equal to 0"):
            plan(recipe_of(adapters(tmp_path), "ties", parameters={"density": [0.5, -1]}))

    def test_a_parameter_of_the_space_is_accepted_beside_the_strategys(self, tmp_path) -> None:
        made = plan(recipe_of(adapters(tmp_path), "drm", parameters={"direction": "vertical", "density": 0.5}))
        assert made.modules[0].group.space.params.direction == "vertical"
        assert made.modules[0].group.space.params.rank_tolerance == 1e-2

    def test_a_parameter_of_another_space_is_unknown(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match="'ties' has no parameter 'direction'"):
            plan(recipe_of(adapters(tmp_path), "ties", parameters={"direction": "vertical"}))

    def test_a_preset_fixes_its_space(self, tmp_path) -> None:
        assert plan(recipe_of(adapters(tmp_path), "knots")).modules[0].group.space.name == "joint"
        with pytest.raises(RecipeError, match="'knots' does not work in space 'core'; it works in joint"):
            plan(recipe_of(adapters(tmp_path), "knots", space="core"))

    def test_a_strategy_refuses_a_space_it_does_not_support(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match="'robustmerge' does not work in space 'delta'; it works in factors"):
            plan(recipe_of(adapters(tmp_path), "robustmerge", space="delta"))

    def test_a_model_may_have_a_density_of_its_own(self, tmp_path) -> None:
        first, second = adapters(tmp_path)
        made = plan(recipe_of([(first, {"density": 0.7}), second], "ties", parameters={"density": 0.3}))
        assert [dict(own) for own in made.modules[0].group.input_params] == [{"density": 0.7}, {}]
        assert made.modules[0].group.strategy.params.density == 0.3

    def test_a_parameter_of_the_whole_merge_is_refused_in_a_model(self, tmp_path) -> None:
        first, second = adapters(tmp_path)
        with pytest.raises(RecipeError, match="'scope' belongs to the whole merge; move it to the top-level"):
            plan(recipe_of([(first, {"scope": "model"}), second], "ties"))

    def test_a_gradient_follows_the_layers(self, tmp_path) -> None:
        made = by_name(plan(recipe_of(adapters(tmp_path), "ties", parameters={"density": [0.2, 0.6]})))
        densities = [made[name].group.strategy.params.density for name in (Q0, Q1, Q2)]
        assert densities == pytest.approx([0.2, 0.4, 0.6])


class TestWeights:
    def test_weights_default_to_one(self, tmp_path) -> None:
        assert plan(recipe_of(adapters(tmp_path))).modules[0].weights == (1.0, 1.0)

    def test_a_weight_may_follow_depth_and_filters(self, tmp_path) -> None:
        first, second = adapters(tmp_path)
        filtered = [{"filter": "down_proj", "value": -2.0}, {"value": [0.0, 1.0]}]
        made = by_name(plan(recipe_of([(first, {"weight": filtered}), second], "task_arithmetic")))
        assert made[DOWN].weights == (-2.0, 1.0)
        assert [made[name].weights[0] for name in (Q0, Q1, Q2)] == [0.0, 0.5, 1.0]

    def test_a_global_weight_is_the_default_of_the_models(self, tmp_path) -> None:
        first, second = adapters(tmp_path)
        made = plan(recipe_of([(first, {"weight": 2.0}), second], parameters={"weight": 0.5}))
        assert made.modules[0].weights == (2.0, 0.5)

    def test_an_average_refuses_weights_that_sum_to_zero(self, tmp_path) -> None:
        first, second = adapters(tmp_path)
        with pytest.raises(StrategyError, match="sum to 0, which cannot normalise an average") as caught:
            plan(recipe_of([(first, {"weight": 1.0}), (second, {"weight": -1.0})]))
        assert "normalize: false" in str(caught.value)


class TestMissingModules:
    @pytest.fixture
    def paths(self, tmp_path):
        (full,) = adapters(tmp_path, 1)
        partial = {name: shape for name, shape in MODULES.items() if name != DOWN}
        return [
            (full, {"weight": 1.0}),
            (str(write_tiny_adapter(tmp_path / "partial", partial, seed=9)), {"weight": 3.0}),
        ]

    def test_zero_leaves_the_weights_and_divides_by_all(self, paths) -> None:
        module = by_name(plan(recipe_of(paths)))[DOWN]
        assert (module.participants, module.weights, module.total_weight) == ((0,), (1.0,), 4.0)

    def test_present_renormalises_over_those_that_have_it(self, paths) -> None:
        module = by_name(plan(recipe_of(paths, missing="present")))[DOWN]
        assert (module.weights, module.total_weight) == ((4.0,), 4.0)

    def test_error_names_the_module_and_the_input(self, paths) -> None:
        with pytest.raises(IncompatibleInputsError, match=f"module '{DOWN}': it is missing in 'partial'"):
            plan(recipe_of(paths, missing="error"))

    def test_a_missing_module_is_a_warning(self, paths) -> None:
        assert plan(recipe_of(paths)).warnings == (f"'partial' lacks 1 of 4 modules ({DOWN})",)

    def test_strict_makes_the_warning_an_error(self, paths) -> None:
        with pytest.raises(MergeError, match="'partial' lacks 1 of 4 modules"):
            plan(recipe_of(paths), strict=True)


class TestRules:
    def test_the_first_rule_that_matches_wins(self, tmp_path) -> None:
        rules = [{"match": "layers.0", "rank": 1}, {"match": "q_proj", "merge_method": "ties"}]
        made = by_name(plan(recipe_of(adapters(tmp_path), rules=rules)))
        assert [made[name].group.method for name in (Q0, DOWN, Q1)] == ["linear", "linear", "ties"]
        assert made[Q0].rank.planned == 1

    def test_a_rule_with_its_own_method_inherits_no_parameters(self, tmp_path) -> None:
        rules = [{"match": "down_proj", "merge_method": "ties"}]
        made = by_name(plan(recipe_of(adapters(tmp_path), "ties", parameters={"density": 0.9}, rules=rules)))
        assert made[DOWN].group.strategy.params.density == 0.2
        assert made[Q0].group.strategy.params.density == 0.9

    def test_a_rule_without_a_method_adds_to_the_global_parameters(self, tmp_path) -> None:
        rules = [{"match": "down_proj", "parameters": {"density": 0.4}}]
        parameters = {"density": 0.9, "elect": "frequency"}
        made = by_name(plan(recipe_of(adapters(tmp_path), "ties", parameters=parameters, rules=rules)))
        assert made[DOWN].group.strategy.params.density == 0.4
        assert made[DOWN].group.strategy.params.elect == "frequency"

    def test_a_rule_that_matches_nothing_is_an_error(self, tmp_path) -> None:
        with pytest.raises(RecipeError, match=r"rules\[0\].match: 'k_proj' matches no module"):
            plan(recipe_of(adapters(tmp_path), rules=[{"match": "k_proj", "scale": 2.0}]))


class TestRanks:
    @pytest.fixture
    def paths(self, tmp_path):
        small = write_tiny_adapter(tmp_path / "r2", MODULES, rank=2, seed=1)
        return [str(small), str(write_tiny_adapter(tmp_path / "r3", MODULES, rank=3, seed=2))]

    @pytest.mark.parametrize(("asked", "written"), [("max", 3), ("sum", 5), (4, 4), (100, 10)])
    def test_rank_policies(self, paths, asked, written) -> None:
        assert plan(recipe_of(paths, output={"rank": asked})).uniform_rank == written

    def test_sum_is_no_more_than_factor_space_can_give(self, paths) -> None:
        assert plan(recipe_of(paths, "robustmerge", output={"rank": "sum"})).uniform_rank == 3

    def test_max_is_the_modules_own_where_ranks_may_differ(self, tmp_path) -> None:
        ranks = {DOWN: 4}
        path = str(write_tiny_adapter(tmp_path / "a", MODULES, rank=2, ranks=ranks))
        made = by_name(plan(recipe_of([path], output={"uniform_rank": False})))
        assert (made[DOWN].rank.planned, made[Q0].rank.planned) == (4, 2)
        assert plan(recipe_of([path])).uniform_rank == 4

    def test_an_energy_rank_is_not_known_from_headers(self, paths) -> None:
        made = plan(recipe_of(paths, output={"rank": {"energy": 0.9}}))
        assert (made.uniform_rank, made.bytes_written) == (None, None)


def test_a_typo_is_told_before_anything_is_downloaded(tmp_path, monkeypatch) -> None:
    def download(*_, **__):
        raise AssertionError("downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(RecipeError) as caught:
        plan(recipe_of(["some-org/math", str(tmp_path / "nowhere")], "tise"))
    assert "did you mean 'ties'" in str(caught.value)
    assert "nowhere" in str(caught.value)
    assert len(caught.value.problems) == 2


def test_a_gradient_over_a_model_wide_threshold_is_a_warning(tmp_path) -> None:
    made = plan(recipe_of(adapters(tmp_path), "knots", parameters={"density": [0.1, 0.5]}))
    assert "'knots' looks at all modules of one set of parameters together, and there are 3 sets" in made.warnings[0]


def test_a_file_of_an_adapter_is_answered_with_its_directory(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    with pytest.raises(MergeError, match=r"is a file of a checkpoint; give its directory, '.*adapter1'"):
        plan(recipe_of([f"{path}/adapter_model.safetensors"]))


class TestTypes:
    def test_the_stored_type_is_the_promotion_of_the_inputs(self, tmp_path) -> None:
        half = str(write_tiny_adapter(tmp_path / "half", MODULES, dtype=torch.float16))
        brain = str(write_tiny_adapter(tmp_path / "brain", MODULES, dtype=torch.bfloat16))
        assert plan(recipe_of([half])).out_dtype == torch.float16
        assert plan(recipe_of([half, brain])).out_dtype == torch.float32
        assert plan(recipe_of([half], out_dtype="bfloat16")).out_dtype == torch.bfloat16

    def test_a_double_input_is_computed_in_double(self, tmp_path) -> None:
        double = str(write_tiny_adapter(tmp_path / "double", MODULES, dtype=torch.float64))
        assert plan(recipe_of([double])).compute_dtype == torch.float64


class TestWarnings:
    def test_different_base_models_are_named(self, tmp_path) -> None:
        first = str(write_tiny_adapter(tmp_path / "a", MODULES, base_model="org/one"))
        second = str(write_tiny_adapter(tmp_path / "b", MODULES, base_model="org/two"))
        (warning,) = plan(recipe_of([first, second])).warnings
        assert "'a': org/one; 'b': org/two" in warning

    def test_the_same_adapter_twice_is_reported(self, tmp_path) -> None:
        (path,) = adapters(tmp_path, 1)
        made = plan(recipe_of([path, path]))
        assert made.warnings == (
            "'adapter1#1' is given 2 times (also as 'adapter1#2'); each counts with its own weight",
        )
        assert [c.label for c in made.inputs] == ["adapter1#1", "adapter1#2"]


def test_a_module_that_exceeds_the_memory_is_refused_with_advice(tmp_path) -> None:
    message = r"needs .* in space 'delta', .*and the merge may hold 1.0 KiB, of which"
    with pytest.raises(MemoryBudgetError, match=message) as caught:
        plan(recipe_of(adapters(tmp_path), "ties"), memory_bytes=1024)
    assert "--memory" in str(caught.value)


def test_every_method_plans_with_nothing_but_defaults(tmp_path) -> None:
    paths = adapters(tmp_path)
    for name in Registry().methods:
        assert plan(recipe_of(paths, name)).modules
