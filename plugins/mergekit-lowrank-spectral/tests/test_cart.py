from __future__ import annotations

import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral import Cart
from torch import Tensor

from mergekit_lowrank import LowRankUpdate, StrategyError
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import CoreSpace, SpaceParams
from mergekit_lowrank.testing import merge_updates, random_update, random_updates


def merged(updates: list[LowRankUpdate], weights: list[float] | None = None, **parameters: float) -> Tensor:
    return densify(merge_updates(Cart(Cart.Params(**parameters)), CoreSpace(SpaceParams()), updates, weights))


def corner(i: int) -> LowRankUpdate:
    """A 3 in one corner of a (3, 3) matrix."""
    unit = torch.eye(3)[[i]]
    return LowRankUpdate(3 * unit.T, unit)


CORNERS = [corner(i) for i in range(3)]


def test_the_average_and_one_direction_of_each_departure_by_hand() -> None:
    # The average is the identity; the first departs from it by diag(2, -1, -1), of which diag(2, 0, 0) is kept.
    torch.testing.assert_close(merged(CORNERS, rank_fraction=1 / 3), 3 * torch.eye(3))


def test_the_factor_multiplies_the_departures() -> None:
    torch.testing.assert_close(merged(CORNERS, rank_fraction=1 / 3, departure_factor=0.5), 2 * torch.eye(3))


def test_the_rank_kept_is_rounded_up() -> None:
    updates = random_updates(12, 10, [2, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(merged(updates, rank_fraction=0.2), merged(updates, rank_fraction=2 / 6))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, -1.0]])
def test_no_direction_and_every_direction_give_the_average(fraction: float, weights: list[float]) -> None:
    updates = random_updates(12, 10, [3, 2, 1], dtype=torch.float64)
    average = sum(w * densify(u) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    torch.testing.assert_close(merged(updates, weights, rank_fraction=fraction), average)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 2.0]])
def test_two_inputs_depart_from_their_average_in_opposite_ways_that_cancel(weights: list[float]) -> None:
    updates = random_updates(12, 10, [3, 2], dtype=torch.float64)
    average = sum(w * densify(u) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    torch.testing.assert_close(merged(updates, weights), average)


def test_an_input_of_weight_zero_leaves_the_departures_of_the_others() -> None:
    updates = random_updates(12, 10, [2, 2, 2], dtype=torch.float64)
    silent = [*updates, random_update(12, 10, 2, 9, dtype=torch.float64)]
    found = merged(silent, [1.0, 1.0, 1.0, 0.0], rank_fraction=0.25)
    torch.testing.assert_close(found, merged(updates, rank_fraction=2 / 6))


def test_one_input_comes_back() -> None:
    update = random_update(12, 10, 3, scaling=2.0, dtype=torch.float64)
    assert Cart(Cart.Params()).returns_single_input()
    torch.testing.assert_close(merged([update]), densify(update))


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    fraction=st.sampled_from([0.0, 0.08, 0.3, 0.7, 1.0]),
    factor=st.sampled_from([0.5, 2.0]),
)
def test_it_is_the_dense_formula(
    d_out: int, d_in: int, ranks: list[int], seed: int, fraction: float, factor: float
) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    weights = [0.5 + t for t in range(len(ranks))]
    deltas = [densify(u).numpy() for u in updates]
    dense = transcriptions.cart(deltas, weights, min(sum(ranks), d_out, d_in), fraction, factor)
    found = merged(updates, weights, rank_fraction=fraction, departure_factor=factor)
    expected = torch.from_numpy(dense)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_weights_that_sum_to_zero_are_refused() -> None:
    message = (
        r"the weights \[1\.0, -1\.0\] sum to 0, and 'cart' divides by their sum; "
        r"give weights of another sum, or use a method without an average, such as tsv"
    )
    with pytest.raises(StrategyError, match=message):
        Cart(Cart.Params()).check_weights([1.0, -1.0], 0.0)


def test_the_report_compares_with_the_average() -> None:
    assert Cart(Cart.Params()).target_weights([1.0, 3.0], 4.0) == (0.25, 0.75)
