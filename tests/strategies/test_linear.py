from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, StreamedUpdate, densify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import (
    DeltaSpace,
    FactorSpace,
    JointParams,
    JointSpace,
    ModuleShape,
    Space,
    SpaceParams,
)
from mergekit_lowrank.strategies import Linear, MergeContext
from mergekit_lowrank.testing import merge_updates, random_updates

DELTA = DeltaSpace(SpaceParams())
X = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, -1.0]]), 2.0)
Y = LowRankUpdate(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0, 1.0, 0.0]]))


def linear(*, normalize: bool) -> Linear:
    return Linear(Linear.Params(normalize=normalize))


def test_a_weighted_average_by_hand() -> None:
    merged = densify(merge_updates(linear(normalize=True), DELTA, [X, Y], [1.0, 3.0]))
    torch.testing.assert_close(merged, torch.tensor([[0.5, 0.0, -0.5], [4.0, 3.0, -1.0]]))


def test_a_weighted_sum_by_hand() -> None:
    merged = densify(merge_updates(linear(normalize=False), DELTA, [X, Y], [1.0, -0.5]))
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0, -2.0], [2.0, -2.0, -4.0]]))


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999), data=st.data())
def test_the_sum_is_exact_whatever_ranks_scalings_and_weights(ranks: list[int], seed: int, data: st.DataObject) -> None:
    numbers = st.lists(st.floats(-3, 3), min_size=len(ranks), max_size=len(ranks))
    weights, scalings = data.draw(numbers), data.draw(numbers)
    updates = random_updates(5, 6, ranks, seed, scalings=scalings, dtype=torch.float64)
    merged = densify(merge_updates(linear(normalize=False), DELTA, updates, weights))
    dense = torch.stack([w * densify(u) for w, u in zip(weights, updates, strict=True)]).sum(dim=0)
    torch.testing.assert_close(merged, dense, rtol=1e-11, atol=1e-10)


def test_an_average_divides_by_the_weights_of_the_whole_recipe() -> None:
    # The third input of the recipe, of weight 2, lacks the module.
    context = MergeContext("m", (0, 1), (1.0, 1.0), 4.0)
    merged = densify(linear(normalize=True).merge(DELTA.encode([X, Y], [1.0, 1.0]), context))
    torch.testing.assert_close(merged, 0.25 * (densify(X) + densify(Y)))


def test_an_average_with_negative_weights_is_affine() -> None:
    merged = densify(merge_updates(linear(normalize=True), DELTA, [X, Y], [2.0, -1.0]))
    torch.testing.assert_close(merged, 2 * densify(X) - densify(Y))


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_one_input_average_to_itself_whatever_their_weights(copies: int) -> None:
    weights = [0.5 + t for t in range(copies)]
    merged = merge_updates(linear(normalize=True), DELTA, [X] * copies, weights)
    torch.testing.assert_close(densify(merged), densify(X))


def test_the_result_is_low_rank_even_in_delta_space() -> None:
    merged = merge_updates(linear(normalize=True), DELTA, random_updates(50, 40, [2, 3]))
    assert isinstance(merged, LowRankUpdate)
    assert merged.rank == 5


def test_an_average_in_factors_divides_the_product_once() -> None:
    merged = densify(merge_updates(linear(normalize=True), FactorSpace(SpaceParams()), [X, X], [1.0, 1.0]))
    # (2·√2·b)(√2·2·a)/2: twice the input, as cross terms make it.
    torch.testing.assert_close(merged, 2 * densify(X))


def test_cat_is_the_plain_sum_at_the_sum_of_the_ranks() -> None:
    cat, plain = (Registry().method(name) for name in ("cat", "task_arithmetic"))
    assert (cat.strategy, cat.parameters, cat.space) == (plain.strategy, plain.parameters, plain.space)
    assert (cat.default_rank, plain.default_rank) == ("sum", "max")


@pytest.mark.parametrize("space", [DELTA, JointSpace(JointParams())], ids=["delta", "joint"])
@pytest.mark.parametrize("normalize", [True, False])
def test_dense_inputs_are_added_up_beside_adapters(space: Space, normalize: bool) -> None:
    x, y = (u.to("cpu", torch.float64) for u in (X, Y))
    found = merge_updates(linear(normalize=normalize), space, [StreamedUpdate.of(densify(x)), y], [1.0, 3.0])
    assert isinstance(found, DenseUpdate)
    torch.testing.assert_close(found.delta, densify(merge_updates(linear(normalize=normalize), DELTA, [x, y], [1, 3])))


def test_a_concatenation_reads_no_coordinates_and_leaves_nothing_in_scratch_space() -> None:
    dense, low = ModuleShape(40, 30, (30, 2), dense=1), ModuleShape(40, 30, (2, 2))
    assert linear(normalize=True).scratch_entries(low, DELTA) == 0
    assert linear(normalize=True).scratch_entries(dense, DELTA) == DELTA.scratch_entries(dense) > 0


def test_cat_takes_no_dense_inputs() -> None:
    methods = Registry().methods
    assert not methods["cat"].takes_dense
    assert methods["task_arithmetic"].takes_dense
