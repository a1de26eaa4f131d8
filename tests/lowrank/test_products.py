from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import (
    DenseUpdate,
    InputUpdate,
    LowRankUpdate,
    StreamedUpdate,
    Update,
    densify,
    distance,
    inner,
    inner_products,
    norm,
    overlaps,
    overlaps_and_energies,
)
from mergekit_lowrank.lowrank import products as products_module
from mergekit_lowrank.testing import random_update, random_updates
from mergekit_lowrank.testing.memory import held


def dense(update: LowRankUpdate) -> torch.Tensor:
    return update.b.double() @ update.a.double() * update.scaling


def kinds(update: LowRankUpdate) -> list[Update]:
    return [update, DenseUpdate(dense(update)), StreamedUpdate.of(dense(update) / 2).scaled(2.0)]


def mixed(updates: list[LowRankUpdate], first: int) -> list[InputUpdate]:
    """Those from ``first`` on as they are, the others dense."""
    return [StreamedUpdate.of(dense(u)) if t < first else u for t, u in enumerate(updates)]


def test_inner_of_hand_made_updates() -> None:
    x = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 1.0]]), 2.0)
    y = DenseUpdate(torch.tensor([[1.0, 5.0, 1.0], [0.0, 5.0, 1.0]]))
    assert inner(x, y) == 8.0
    assert inner(y, x) == 8.0
    assert norm(x) == pytest.approx(math.sqrt(40))


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    scalings=st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    seed=st.integers(0, 999),
)
def test_inner_equals_the_dense_inner_product_for_every_pair_of_kinds(
    d_out: int, d_in: int, ranks: tuple[int, int], scalings: tuple[float, float], seed: int
) -> None:
    x, y = random_updates(d_out, d_in, ranks, seed, scalings=scalings, dtype=torch.float64)
    expected = float((dense(x) * dense(y)).sum())
    for left in kinds(x):
        for right in kinds(y):
            assert inner(left, right) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    scaling=st.floats(-4, 4),
    seed=st.integers(0, 999),
)
def test_the_inner_products_of_all_pairs_are_those_of_each_pair(ranks: list[int], scaling: float, seed: int) -> None:
    scalings = [scaling, *([0.5] * (len(ranks) - 1))]
    updates = random_updates(7, 9, ranks, seed, scalings=scalings, dtype=torch.float64)
    expected = torch.stack([torch.stack([(dense(x) * dense(y)).sum() for y in updates]) for x in updates])
    torch.testing.assert_close(inner_products(updates), expected, rtol=1e-10, atol=1e-10)


def test_inner_accumulates_float32_factors_in_float64() -> None:
    x, y = random_updates(300, 200, [16, 16])
    assert inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), rel=1e-12)


def test_inner_reads_dense_deltas_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_updates(10, 7, [2, 3], dtype=torch.float64)
    whole = [inner(DenseUpdate(dense(x)), other) for other in kinds(y)]
    monkeypatch.setattr(products_module, "STREAM_ENTRIES", 21)
    assert [inner(DenseUpdate(dense(x)), other) for other in kinds(y)] == pytest.approx(whole, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    first=st.integers(0, 4),
    kind=st.integers(0, 2),
    limit=st.sampled_from([1, 50, 1 << 19]),
    seed=st.integers(0, 999),
)
def test_products_of_dense_and_mixed_updates_are_those_of_their_factors(
    ranks: list[int], first: int, kind: int, limit: int, seed: int
) -> None:
    one, *updates = random_updates(7, 9, [3, *ranks], seed, scalings=[0.5] * (len(ranks) + 1), dtype=torch.float64)
    merged, given, coefficients = kinds(one)[kind], mixed(updates, first), [0.5] * len(ranks)
    total = sum((0.5 * dense(u) for u in updates), torch.zeros(7, 9).double())
    digits = {"rel": 1e-10, "abs": 1e-10}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(products_module, "STREAM_ENTRIES", limit)
        expected = inner_products(updates)
        torch.testing.assert_close(inner_products(given), expected, rtol=1e-10, atol=1e-10)
        found, energies = overlaps_and_energies(merged, given)
        assert found == pytest.approx([float((dense(one) * dense(u)).sum()) for u in updates], **digits)
        assert overlaps(merged, given) == pytest.approx(found, **digits)
        assert energies == pytest.approx(expected.diagonal().tolist(), **digits)
        wanted = float((dense(one) - total).norm())
        assert distance(merged, given, coefficients) == pytest.approx(wanted, **digits)


def test_dense_rows_in_float32_are_accumulated_in_float64() -> None:
    x, y = (torch.randn(300, 200, generator=torch.Generator().manual_seed(t)) for t in range(2))
    expected = float((x.double() * y.double()).sum())
    assert inner(StreamedUpdate.of(x), DenseUpdate(y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pair", [("dense", "dense"), ("dense", "streamed"), ("streamed", "low")])
def test_products_of_dense_updates_hold_no_more_than_blocks(pair: tuple[str, str]) -> None:
    delta = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    known = {"dense": DenseUpdate(delta), "streamed": StreamedUpdate.of(delta), "low": random_update(3000, 2000, 4)}
    x, y = (known[name] for name in pair)
    inner(x, y)
    assert held(lambda: inner(x, y)).peak_bytes < 6 * 8 * products_module.STREAM_ENTRIES


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["low-rank", "dense", "streamed"])
def test_the_norm_of_a_zero_update_is_exactly_zero(kind: int) -> None:
    assert norm(kinds(LowRankUpdate(torch.zeros(4, 2), torch.randn(2, 5)))[kind]) == 0.0


def test_the_norm_does_not_depend_on_the_sign_of_the_scaling() -> None:
    update = random_update(6, 5, 2)
    assert norm(update.scaled(-2.0)) == pytest.approx(2 * norm(update))


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    coefficient=st.floats(-2, 2),
)
def test_the_distance_to_a_weighted_sum_equals_the_dense_one(ranks: list[int], seed: int, coefficient: float) -> None:
    merged, *targets = random_updates(7, 8, [2, *ranks], seed, dtype=torch.float64)
    coefficients = [coefficient] * len(targets)
    total = sum((coefficient * dense(u) for u in targets), torch.zeros(7, 8).double())
    expected = float((dense(merged) - total).norm())
    assert distance(merged, targets, coefficients) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_the_distance_between_nearly_equal_updates_does_not_cancel() -> None:
    update = random_update(60, 50, 4, dtype=torch.float64)
    moved = LowRankUpdate(update.b + 1e-9 * random_update(60, 50, 4, 1, dtype=torch.float64).b, update.a)
    expected = float(((moved.b - update.b) @ update.a).norm())
    assert distance(moved, [update], [1.0]) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_an_update_to_itself_is_of_rounding_size_in_float32() -> None:
    update = random_update(60, 50, 4)
    assert distance(update, [update], [1.0]) < 1e-6 * norm(update)


def test_the_distance_of_a_truncation_in_float32_is_relative_to_what_was_lost() -> None:
    update = random_update(60, 50, 4)
    lost = LowRankUpdate(1e-3 * update.b[:, :1], update.a[:1])
    merged = LowRankUpdate(torch.cat([update.b, lost.b], dim=1), torch.cat([update.a, lost.a]))
    assert distance(merged, [update], [1.0]) == pytest.approx(norm(lost), rel=1e-3)


def test_densify_agrees_with_the_reference_product_of_these_tests() -> None:
    update = random_update(4, 5, 2, scaling=3.0, dtype=torch.float64)
    torch.testing.assert_close(densify(update), dense(update))
