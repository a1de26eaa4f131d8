from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import (
    DenseUpdate,
    LowRankUpdate,
    StreamedUpdate,
    are_low_rank,
    blocks_of_rows,
    concatenate,
    converted,
    densify,
    low_rank,
    padded_stacks,
)
from mergekit_lowrank.lowrank import updates as updates_module
from mergekit_lowrank.testing import random_update, random_updates

B = torch.tensor([[1.0], [2.0]])
A = torch.tensor([[1.0, 0.0, -1.0]])


def test_densify_multiplies_the_factors_and_the_scaling() -> None:
    delta = densify(LowRankUpdate(B, A, 3.0))
    assert torch.equal(delta, torch.tensor([[3.0, 0.0, -3.0], [6.0, 0.0, -6.0]]))


def test_densify_returns_the_delta_of_a_dense_update_itself() -> None:
    delta = torch.ones(2, 3)
    assert densify(DenseUpdate(delta)) is delta


def test_rank_and_shape_come_from_the_factors() -> None:
    update = random_update(5, 3, 2)
    assert (update.rank, update.shape) == (2, (5, 3))


def test_scaled_shares_the_factors_of_a_low_rank_update() -> None:
    update = LowRankUpdate(B, A, 3.0).scaled(-2.0)
    assert update.b is B
    assert update.a is A
    assert update.scaling == -6.0


def test_scaled_by_one_returns_the_dense_update_itself() -> None:
    update = DenseUpdate(torch.ones(2, 3))
    assert update.scaled(1.0) is update


def test_scaled_multiplies_a_dense_update() -> None:
    assert torch.equal(DenseUpdate(torch.ones(2, 3)).scaled(2.0).delta, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("where", [slice(0, 5), slice(1, 3), slice(4, 5), slice(2, 2)])
def test_rows_are_those_of_the_delta_for_every_kind(where: slice) -> None:
    update = random_update(5, 3, 2, scaling=0.5, dtype=torch.float64)
    delta = densify(update)
    for same in (update, DenseUpdate(delta), StreamedUpdate.of(delta), StreamedUpdate.of(delta / 4).scaled(4.0)):
        torch.testing.assert_close(same.rows(where), delta[where])
        torch.testing.assert_close(densify(same), delta)
        assert (same.shape, same.dtype, same.device) == ((5, 3), torch.float64, torch.device("cpu"))


def test_rows_of_a_streamed_update_are_new_each_time_and_may_be_overwritten() -> None:
    delta = torch.ones(4, 3)
    update = StreamedUpdate.of(delta).scaled(3.0)
    update.rows(slice(0, 2)).zero_()
    assert torch.equal(update.rows(slice(0, 4)), torch.full((4, 3), 3.0))
    assert torch.equal(delta, torch.ones(4, 3))


def test_nothing_is_read_until_rows_are_asked_for() -> None:
    update = StreamedUpdate((4, 3), torch.float32, torch.device("cpu"), lambda _: pytest.fail("read"))
    assert update.scaled(2.0).to("cpu", torch.float64).scaling == 2.0


def test_a_streamed_update_gives_its_rows_in_another_type() -> None:
    update = StreamedUpdate.of(torch.tensor([[0.1], [0.2]])).scaled(3.0).to("cpu", torch.float64)
    assert update.dtype == torch.float64
    assert torch.equal(update.rows(slice(0, 2)), torch.tensor([[0.1], [0.2]]).double() * 3.0)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 50), columns=st.integers(0, 50), entries=st.integers(1, 400))
def test_blocks_of_rows_cover_all_rows_in_order_within_the_limit(rows: int, columns: int, entries: int) -> None:
    blocks = blocks_of_rows((rows, columns), entries)
    assert [i for where in blocks for i in range(where.start, where.stop)] == list(range(rows))
    assert all(where.stop - where.start == 1 or (where.stop - where.start) * columns <= entries for where in blocks)


def test_a_streamed_update_is_copied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates_module, "READ_ENTRIES", 6)
    delta = torch.arange(15.0).view(5, 3)
    assert torch.equal(densify(StreamedUpdate.of(delta)), delta)


def test_only_updates_with_factors_are_low_rank() -> None:
    low = random_updates(5, 3, [2, 1])
    assert low_rank(low, "knots") is low
    assert are_low_rank(low)
    mixed = [low[0], StreamedUpdate.of(torch.ones(5, 3))]
    assert not are_low_rank(mixed)
    with pytest.raises(StrategyError, match=r"'knots' works on the factors .* inputs \[1\] are dense"):
        low_rank(mixed, "knots")


def test_mixed_updates_are_converted_each_on_its_own() -> None:
    low = random_update(5, 3, 2, dtype=torch.float16)
    found, streamed = converted([low, StreamedUpdate.of(torch.ones(5, 3))], torch.float64)
    assert (found.dtype, streamed.dtype) == (torch.float64, torch.float64)
    assert torch.equal(streamed.rows(slice(0, 5)), torch.ones(5, 3).double())


def test_transposed_is_the_update_of_the_transposed_delta() -> None:
    update = random_update(5, 3, 2, scaling=0.5)
    assert torch.equal(densify(update.transposed()), (update.a.T @ update.b.T) * 0.5)
    assert DenseUpdate(densify(update)).transposed().shape == (3, 5)


def test_to_changes_both_factors_and_keeps_the_scaling() -> None:
    update = random_update(5, 3, 2, scaling=0.5).to("cpu", torch.float64)
    assert (update.a.dtype, update.b.dtype, update.scaling) == (torch.float64, torch.float64, 0.5)


def test_concatenate_stacks_scaled_columns_of_b_and_untouched_rows_of_a() -> None:
    second = LowRankUpdate(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0, 6.0, 7.0]]), 2.0)
    stacked = concatenate([LowRankUpdate(B, A, 3.0), second], [1.0, -0.5])
    assert torch.equal(stacked.b, torch.tensor([[3.0, 0.0], [6.0, -1.0]]))
    assert torch.equal(stacked.a, torch.tensor([[1.0, 0.0, -1.0], [5.0, 6.0, 7.0]]))
    assert stacked.scaling == 1.0


def test_concatenate_of_one_update_keeps_its_factors_and_puts_the_coefficient_into_the_scaling() -> None:
    stacked = concatenate([LowRankUpdate(B, A, 3.0)], [0.5])
    assert stacked.b is B
    assert stacked.a is A
    assert stacked.scaling == 1.5


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_concatenate_equals_the_dense_weighted_sum(
    d_out: int, d_in: int, ranks: list[int], seed: int, data: st.DataObject
) -> None:
    numbers = st.lists(st.floats(-3, 3), min_size=len(ranks), max_size=len(ranks))
    scalings, coefficients = data.draw(numbers), data.draw(numbers)
    updates = random_updates(d_out, d_in, ranks, seed, scalings=scalings, dtype=torch.float64)
    dense = sum((c * densify(u) for c, u in zip(coefficients, updates, strict=True)), torch.zeros(d_out, d_in).double())
    stacked = concatenate(updates, coefficients)
    assert stacked.rank == sum(ranks)
    torch.testing.assert_close(densify(stacked), dense, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_concatenate_keeps_the_type_of_the_factors(dtype: torch.dtype) -> None:
    assert concatenate(random_updates(3, 4, [1, 2], dtype=dtype), [1.0, 2.0]).b.dtype == dtype


def test_factors_that_lie_one_behind_the_other_are_stacked_without_a_copy() -> None:
    updates = converted(random_updates(5, 4, [2, 2, 2], dtype=torch.float16), torch.float32)
    b, a = padded_stacks(updates)
    assert b.data_ptr() == updates[0].b.data_ptr()
    assert a.data_ptr() == updates[0].a.data_ptr()
    assert torch.equal(b, torch.stack([u.b for u in updates]))
    assert torch.equal(a, torch.stack([u.a for u in updates]))


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (0, 2), (0,), (2, 1, 0)])
def test_slices_in_another_order_are_copied_to_a_stack(order: tuple[int, ...]) -> None:
    updates = converted(random_updates(5, 4, [2, 2, 2], dtype=torch.float16), torch.float32)
    chosen = [updates[t] for t in order]
    b, a = padded_stacks(chosen)
    assert torch.equal(b, torch.stack([u.b for u in chosen]))
    assert torch.equal(a, torch.stack([u.a for u in chosen]))


@pytest.mark.parametrize("ranks", [[2, 2], [1, 3]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_converted_updates_are_the_same_in_another_type(ranks: list[int], dtype: torch.dtype) -> None:
    updates = random_updates(5, 4, ranks, scalings=[0.5, 2.0], dtype=dtype)
    for update, found in zip(updates, converted(updates, torch.float32), strict=True):
        assert torch.equal(found.b, update.b.float())
        assert torch.equal(found.a, update.a.float())
        assert found.scaling == update.scaling
