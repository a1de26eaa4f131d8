from __future__ import annotations

import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral import IsoC, IsoCts
from torch import Tensor

from mergekit_lowrank import LowRankUpdate, Strategy
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import CoreSpace, SpaceParams
from mergekit_lowrank.testing import merge_updates, random_updates

ISO_C, ISO_CTS = IsoC(IsoC.Params()), IsoCts(IsoCts.Params())


def merged(strategy: Strategy, updates: list[LowRankUpdate], weights: list[float] | None = None) -> Tensor:
    return densify(merge_updates(strategy, CoreSpace(SpaceParams()), updates, weights))


def diagonal(*values: float) -> LowRankUpdate:
    """diag(values), of the rank that it has."""
    rows = torch.eye(len(values))[[i for i, value in enumerate(values) if value]]
    return LowRankUpdate(torch.tensor(values).unsqueeze(1) * rows.T, rows)


def test_the_singular_values_of_the_sum_become_their_mean() -> None:
    found = merged(ISO_C, [diagonal(2.0, 0.0, 0.0), diagonal(1.0, 1.0, 0.0)])
    torch.testing.assert_close(found, torch.diag(torch.tensor([2.0, 2.0, 0.0])))


def test_directions_in_which_the_inputs_cancel_stay_zero() -> None:
    found = merged(ISO_C, [diagonal(2.0, 4.0), diagonal(1.0, -4.0)])
    torch.testing.assert_close(found, torch.diag(torch.tensor([3.0, 0.0])))


def test_inputs_that_cancel_give_zero() -> None:
    (update,) = random_updates(9, 8, [3])
    for strategy in (ISO_C, ISO_CTS):
        assert float(merged(strategy, [update, update], [1.0, -1.0]).abs().max()) < 1e-12


def test_weights_multiply_the_inputs() -> None:
    found = merged(ISO_C, [diagonal(2.0, 0.0), diagonal(0.0, 1.0)], [2.0, -2.0])
    torch.testing.assert_close(found, torch.diag(torch.tensor([3.0, -3.0])))


def test_the_nuclear_norm_of_the_sum_stays() -> None:
    updates = random_updates(12, 10, [3, 2], dtype=torch.float64)
    whole = sum(densify(u) for u in updates)
    found = merged(ISO_C, updates)
    torch.testing.assert_close(torch.linalg.matrix_norm(found, "nuc"), torch.linalg.matrix_norm(whole, "nuc"))


def test_directions_of_the_sum_and_of_each_input_by_hand() -> None:
    # R = 4, but three directions: one of the sum (8), and one of what it leaves of each input (2 and 1).
    strategy = IsoCts(IsoCts.Params(common_space_fraction=0.4))
    found = merged(strategy, [diagonal(4.0, 2.0, 0.0), diagonal(4.0, 0.0, 1.0)])
    torch.testing.assert_close(found, torch.eye(3) * 11 / 3)


@pytest.mark.parametrize(
    ("directions", "inputs", "fraction", "own"),
    [(18, 3, 0.8, 1), (12, 3, 0.8, 1), (10, 2, 0.5, 2), (14, 2, 0.5, 4), (10, 3, 1.0, 0), (2, 3, 0.0, 1)],
)
def test_what_the_sum_leaves_is_divided_among_the_inputs_and_rounded_half_to_even(
    directions: int, inputs: int, fraction: float, own: int
) -> None:
    assert IsoCts(IsoCts.Params(common_space_fraction=fraction)).own_directions(directions, inputs) == own


def test_a_common_space_of_everything_is_iso_c() -> None:
    updates = random_updates(12, 10, [3, 2], dtype=torch.float64)
    everything = IsoCts(IsoCts.Params(common_space_fraction=1.0))
    torch.testing.assert_close(merged(everything, updates), merged(ISO_C, updates))


def test_copies_of_one_input_have_no_directions_outside_their_sum() -> None:
    (update,) = random_updates(12, 10, [3], dtype=torch.float64)
    torch.testing.assert_close(merged(ISO_CTS, [update] * 2), merged(ISO_C, [update] * 2))


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
)
def test_they_are_the_dense_formulas(d_out: int, d_in: int, ranks: list[int], seed: int, fraction: float) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    weights = [0.5 + t for t in range(len(ranks))]
    deltas = [w * densify(u).numpy() for w, u in zip(weights, updates, strict=True)]
    directions = min(sum(ranks), d_out, d_in)
    cts = IsoCts(IsoCts.Params(common_space_fraction=fraction))
    for strategy, dense in (
        (ISO_C, transcriptions.iso_c(deltas, 1e-5)),
        (cts, transcriptions.iso_cts(deltas, directions, fraction, 1e-5)),
    ):
        expected = torch.from_numpy(dense)
        found = merged(strategy, updates, weights)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_neither_returns_a_single_input() -> None:
    assert not ISO_C.returns_single_input()
    assert not ISO_CTS.returns_single_input()
