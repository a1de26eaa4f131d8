from __future__ import annotations

import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral import Star

from mergekit_lowrank import LowRankUpdate, StrategyError
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.testing import merge_updates, random_update, random_updates


def merged(updates: list[LowRankUpdate], weights: list[float] | None = None, share: float = 0.4) -> LowRankUpdate:
    strategy = Star(Star.Params(nuclear_share=share))
    update = merge_updates(strategy, DeltaSpace(SpaceParams()), updates, weights)
    assert isinstance(update, LowRankUpdate)
    return update


def diagonal(*values: float) -> LowRankUpdate:
    return LowRankUpdate(torch.diag(torch.tensor(values)), torch.eye(len(values)))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, [10.0, 0.0, 0.0]),
        (0.6, [10.0, 0.0, 0.0]),  # reached exactly
        (0.61, [60 / 9, 30 / 9, 0.0]),
        (0.95, [6.0, 3.0, 1.0]),
        (1.0, [6.0, 3.0, 1.0]),
    ],
)
def test_the_leading_directions_that_reach_the_share_take_over_the_nuclear_norm(
    share: float, expected: list[float]
) -> None:
    found = densify(merged([diagonal(6.0, 3.0, 1.0)], share=share))
    torch.testing.assert_close(found, torch.diag(torch.tensor(expected)))


def test_the_truncated_updates_are_averaged() -> None:
    found = merged([diagonal(6.0, 3.0, 1.0), diagonal(0.0, 4.0, 0.0)], [1.0, 3.0])
    torch.testing.assert_close(densify(found), torch.diag(torch.tensor([2.5, 3.0, 0.0])))
    assert found.rank == 2


def test_a_zero_update_is_zero_and_counts_in_the_average() -> None:
    found = merged([diagonal(0.0, 0.0), diagonal(4.0, 0.0)])
    torch.testing.assert_close(densify(found), torch.diag(torch.tensor([2.0, 0.0])))


@pytest.mark.parametrize(("share", "promised"), [(1.0, True), (0.99, False)])
def test_one_input_comes_back_where_nothing_is_cut(share: float, promised: bool) -> None:
    assert Star(Star.Params(nuclear_share=share)).returns_single_input() is promised
    update = random_update(9, 8, 3, scaling=2.0, dtype=torch.float64)
    torch.testing.assert_close(densify(merged([update], share=1.0)), densify(update))


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.2, 0.4, 0.75, 1.0]),
)
def test_it_is_the_dense_formula(d_out: int, d_in: int, ranks: list[int], seed: int, share: float) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    weights = [0.5 + t for t in range(len(ranks))]
    expected = torch.from_numpy(transcriptions.star([densify(u).numpy() for u in updates], weights, share))
    found = densify(merged(updates, weights, share))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(StrategyError, match="'star' divides by their sum"):
        Star(Star.Params()).check_weights([1.0, -1.0], 0.0)
