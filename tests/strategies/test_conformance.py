"""What every method owes its users, in every space that it supports."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import ModuleShape
from mergekit_lowrank.testing import merge_modules, merge_updates, random_update, random_updates
from tests.strategies.methods import Method, assert_close, each

CASES = {
    "odd sizes": (7, 9, [2, 2, 2]),
    "mixed ranks": (7, 9, [1, 4, 2]),
    "rank one": (5, 3, [1, 1]),
    "one input": (7, 9, [2]),
    "joint rank above a side": (4, 11, [3, 3]),
    "joint rank above both sides": (5, 4, [4, 4, 4]),
    "rank above both sides": (3, 2, [6, 5]),
    "one by one": (1, 1, [1, 2]),
}


@each()
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_finite_and_has_the_shape_and_type_of_the_inputs(
    method: Method, case: tuple[int, int, list[int]], dtype: torch.dtype
) -> None:
    d_out, d_in, ranks = case
    merged = method.merged(random_updates(d_out, d_in, ranks, dtype=dtype))
    assert merged.shape == (d_out, d_in)
    assert merged.dtype == dtype
    assert bool(merged.isfinite().all())


@each()
def test_float32_agrees_with_float64(method: Method) -> None:
    single = random_updates(13, 11, [2, 3], 4, scalings=[2.0, 0.5])
    double = [u.to("cpu", torch.float64) for u in single]
    assert_close(method.merged(single, [0.7, 1.1]).double(), method.merged(double, [0.7, 1.1]), 1e-4)


@each()
def test_the_inputs_are_not_modified(method: Method) -> None:
    updates = random_updates(7, 9, [2, 3], scalings=[2.0, 0.5])
    before = [(u.a.clone(), u.b.clone(), u.scaling) for u in updates]
    method.merged(updates, [0.5, -1.5])
    for update, (a, b, scaling) in zip(updates, before, strict=True):
        assert torch.equal(update.a, a)
        assert torch.equal(update.b, b)
        assert update.scaling == scaling


@each()
def test_inputs_need_not_be_contiguous(method: Method) -> None:
    updates = random_updates(7, 9, [2, 3], dtype=torch.float64)
    views = [LowRankUpdate(u.b.T.contiguous().T, u.a.T.contiguous().T, u.scaling) for u in updates]
    assert_close(method.merged(views), method.merged(updates))


@each()
def test_the_same_inputs_give_the_same_bits(method: Method) -> None:
    updates = random_updates(7, 9, [2, 3])
    assert torch.equal(method.merged(updates), method.merged(updates))


@each()
@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_zero_inputs_merge_to_zero(method: Method, zero: str) -> None:
    updates = [LowRankUpdate(u.b * (zero == "a"), u.a * (zero == "b"), u.scaling) for u in random_updates(7, 9, [2, 3])]
    assert torch.equal(method.merged(updates), torch.zeros(7, 9))


@each()
@pytest.mark.parametrize("zero", ["a", "b"])
def test_one_zero_input_among_others_leaves_the_result_finite(method: Method, zero: str) -> None:
    first, second, third = random_updates(7, 9, [2, 3, 2])
    silent = LowRankUpdate(second.b * (zero == "a"), second.a * (zero == "b"))
    merged = method.merged([first, silent, third])
    assert bool(merged.isfinite().all())
    assert float(merged.abs().max()) > 0


def promises_identity(method: Method) -> bool:
    return method.strategy(density=1.0).returns_single_input()


@each(promises_identity)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_one_input_comes_back_where_the_method_promises_it(method: Method, rank: int) -> None:
    update = random_update(7, 9, rank, scaling=2.0, dtype=torch.float64)
    assert_close(method.merged([update], density=1.0), densify(update), 1e-8)


@each(lambda method: method.preset.strategy.name == "linear" and method.space_kind.name != "factors")
def test_linear_returns_the_factors_of_one_input_bit_for_bit(method: Method) -> None:
    update = random_update(7, 9, 2, scaling=2.0)
    merged = merge_updates(method.strategy(), method.space(), [update])
    assert isinstance(merged, LowRankUpdate)
    assert merged.a is update.a
    assert merged.b is update.b
    assert merged.scaling == update.scaling


def test_the_methods_that_promise_identity_at_density_one_are_linear_and_ties() -> None:
    registry = Registry()
    promised = {
        preset.name
        for preset in registry.methods.values()
        if preset.strategy(
            preset.strategy.Params(**({"density": 1.0} if "density" in preset.strategy.Params.model_fields else {}))
        ).returns_single_input()
    }
    assert promised == {"linear", "task_arithmetic", "ties", "knots", "core_ties"}


@each(lambda method: method.preset.strategy.is_order_free)
def test_permuted_inputs_give_equal_values(method: Method) -> None:
    updates = random_updates(7, 9, [2, 3, 1], 2, scalings=[1.0, 0.5, 2.0], dtype=torch.float64)
    weights = [0.7, -0.4, 1.2]
    order = [2, 0, 1]
    turned = method.merged([updates[i] for i in order], [weights[i] for i in order])
    assert_close(turned, method.merged(updates, weights))


@each()
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scaling_every_input_scales_the_result(method: Method, factor: float) -> None:
    updates = random_updates(7, 9, [2, 3, 1], 1, dtype=torch.float64)
    assert_close(method.merged([u.scaled(factor) for u in updates]), factor * method.merged(updates))


@each()
def test_duplicated_adapters_merge_to_a_finite_result(method: Method) -> None:
    update = random_update(7, 9, 3)
    merged = method.merged([update] * 3, [0.5, 0.25, 0.25])
    assert bool(merged.isfinite().all())


@each(lambda method: promises_identity(method) and method.space_kind.name != "factors")
@pytest.mark.parametrize("copies", [2, 3, 8])
def test_copies_with_weight_one_over_n_merge_to_themselves_in_linear_spaces(method: Method, copies: int) -> None:
    # A mean over n copies divides by Σ|w| = 1, a sum adds n·(1/n).
    update = random_update(7, 9, 2, scaling=2.0, dtype=torch.float64)
    assert_close(method.merged([update] * copies, [1 / copies] * copies, density=1.0), densify(update), 1e-8)


@each()
def test_negative_weights_give_finite_results(method: Method) -> None:
    assert bool(method.merged(random_updates(7, 9, [2, 3, 1]), [-0.5, 1.0, -2.0]).isfinite().all())


@each(lambda method: not method.preset.strategy.name.startswith("linear"))
def test_weights_that_sum_to_zero_are_fine(method: Method) -> None:
    method.strategy().check_weights([1.0, -1.0], 0.0)
    assert bool(method.merged(random_updates(7, 9, [2, 3]), [1.0, -1.0]).isfinite().all())


@each(lambda method: method.preset.name == "linear")
def test_an_average_refuses_weights_that_sum_to_zero(method: Method) -> None:
    message = (
        r"the weights \[1\.0, -1\.0\] sum to 0, which cannot normalise an average; "
        r"set parameters\.normalize: false for the plain sum"
    )
    with pytest.raises(StrategyError, match=message):
        method.strategy().check_weights([1.0, -1.0], 0.0)


@each(lambda method: method.preset.name == "task_arithmetic")
def test_a_plain_sum_takes_weights_that_sum_to_zero(method: Method) -> None:
    method.strategy().check_weights([1.0, -1.0], 0.0)


@each()
def test_a_zero_weight_gives_a_finite_result(method: Method) -> None:
    assert bool(method.merged(random_updates(7, 9, [2, 3]), [0.0, 1.0]).isfinite().all())


@each()
def test_module_names_and_other_modules_do_not_change_a_result_of_tensor_scope(method: Method) -> None:
    updates, others = random_updates(7, 9, [2, 3]), random_updates(5, 4, [1, 1], 7)
    strategy = method.strategy(scope="tensor")
    together = merge_modules(strategy, method.space(), {"b": others, "a": updates}, [1.0, 1.0])
    assert torch.equal(densify(together["a"]), method.merged(updates, scope="tensor"))


SHAPE = ModuleShape(64, 48, (4, 8))
LARGER = [ModuleShape(128, 48, (4, 8)), ModuleShape(64, 96, (4, 8)), ModuleShape(64, 48, (4, 16))]


@each()
@pytest.mark.parametrize("larger", LARGER)
def test_memory_estimates_are_positive_and_grow(method: Method, larger: ModuleShape) -> None:
    strategy, space = method.strategy(), method.space()
    assert 0 < strategy.working_entries(SHAPE, space) <= strategy.working_entries(larger, space)


@each()
def test_target_weights_are_one_for_each_input(method: Method) -> None:
    found = method.strategy().target_weights([1.0, 3.0], 4.0)
    averaged = method.preset.name == "linear"
    assert found == ((0.25, 0.75) if averaged else (1.0, 3.0))
    assert all(math.isfinite(c) for c in found)
