from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, densify, distance, norm
from mergekit_lowrank.policies import VLLM_RANKS, BudgetRank, EnergyRank, ErrorRank, FixedRank, WholeRank, snapped
from mergekit_lowrank.strategies import keyed_generator
from mergekit_lowrank.testing import random_update


def generator() -> torch.Generator:
    return keyed_generator("test")


def diagonal(*values: float) -> LowRankUpdate:
    return LowRankUpdate(torch.diag(torch.tensor(values, dtype=torch.float64)), torch.eye(len(values)).double())


@pytest.mark.parametrize("rank", [3, 4, 99])
def test_a_fixed_rank_leaves_factors_untouched_that_are_small_enough(rank: int) -> None:
    update = random_update(9, 8, 3, scaling=0.5)
    compressed = FixedRank(rank).compress(update, generator())
    assert compressed.update is update
    assert compressed.kept_energy == 1.0


def test_a_fixed_rank_cuts_to_the_leading_directions() -> None:
    compressed = FixedRank(2).compress(diagonal(1.0, 3.0, 2.0), generator())
    torch.testing.assert_close(densify(compressed.update), torch.diag(torch.tensor([0.0, 3.0, 2.0])).double())
    assert compressed.kept_energy == pytest.approx(13 / 14)


def test_a_fixed_rank_factorises_a_dense_update() -> None:
    dense = DenseUpdate(densify(diagonal(1.0, 3.0, 2.0)))
    compressed = FixedRank(1).compress(dense, generator())
    assert compressed.update.rank == 1
    assert compressed.kept_energy == pytest.approx(9 / 14)


def test_a_fixed_rank_above_what_exists_gives_what_exists() -> None:
    dense = DenseUpdate(densify(random_update(5, 4, 2, dtype=torch.float64)))
    compressed = FixedRank(50).compress(dense, generator())
    assert compressed.update.rank <= 4
    torch.testing.assert_close(densify(compressed.update), dense.delta)
    assert compressed.kept_energy == 1.0


def test_a_fixed_rank_is_known_from_headers_and_others_are_not() -> None:
    assert FixedRank(7).planned == 7
    for policy in (EnergyRank(0.9, 8), ErrorRank(0.1, 8), BudgetRank(8, 2)):
        assert policy.planned is None


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 6), keep=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_energy_a_fixed_rank_reports_is_what_it_kept(rank: int, keep: int, seed: int) -> None:
    update = random_update(9, 8, rank, seed, dtype=torch.float64)
    compressed = FixedRank(keep).compress(update, generator())
    lost = distance(compressed.update, [update], [1.0]) ** 2 / norm(update) ** 2
    assert compressed.kept_energy == pytest.approx(1 - lost, abs=1e-10)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.96, 2), (0.97, 3), (1.0, 3)])
@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_an_energy_keeps_the_least_rank_that_reaches_it_even_exactly(share: float, rank: int, dense: bool) -> None:
    # The squares are 16, 8 and 1 of 25: shares 0.64, 0.96 and 1.
    update = diagonal(4.0, 8**0.5, 1.0)
    compressed = EnergyRank(share, 3).compress(DenseUpdate(densify(update)) if dense else update, generator())
    assert compressed.update.rank == rank


def test_an_energy_of_one_drops_directions_that_are_only_rounding() -> None:
    update = random_update(9, 8, 2)
    doubled = LowRankUpdate(torch.cat([update.b, update.b], dim=1), torch.cat([update.a, update.a]))
    assert EnergyRank(1.0, 8).compress(doubled, generator()).update.rank == 2


@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_a_zero_update_keeps_one_direction(dense: bool) -> None:
    zero = LowRankUpdate(torch.zeros(5, 2), torch.zeros(2, 4))
    compressed = EnergyRank(0.9, 4).compress(DenseUpdate(densify(zero)) if dense else zero, generator())
    assert compressed.update.rank == 1
    assert torch.equal(densify(compressed.update), torch.zeros(5, 4))
    assert compressed.kept_energy == 1.0


def test_the_guess_for_a_large_dense_update_is_doubled_until_the_share_is_reached() -> None:
    source = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(800, 12, generator=source))
    v, _ = torch.linalg.qr(torch.randn(780, 12, generator=source))
    compressed = EnergyRank(0.999, 780, first_guess=4).compress(DenseUpdate(u @ v.T), generator())
    assert compressed.update.rank == 12
    assert compressed.kept_energy >= 0.999


def test_the_same_generator_gives_the_same_cut_of_a_large_dense_update() -> None:
    delta = random_update(800, 780, 30).b @ random_update(800, 780, 30).a
    first, second = (FixedRank(4).compress(DenseUpdate(delta), generator()).update for _ in range(2))
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.a, second.a)


@pytest.mark.parametrize(("bound", "rank"), [(0.99, 1), (0.6, 1), (0.59, 2), (0.2, 2), (0.19, 3), (1e-9, 3)])
@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_an_error_keeps_the_least_rank_within_it_even_exactly(bound: float, rank: int, dense: bool) -> None:
    # The squares are 16, 8 and 1 of 25: cuts at 1 and 2 leave the errors 0.6 and 0.2.
    update = diagonal(4.0, 8**0.5, 1.0)
    compressed = ErrorRank(bound, 3).compress(DenseUpdate(densify(update)) if dense else update, generator())
    assert compressed.update.rank == rank
    assert compressed.error <= bound * (1 + 1e-9)


def test_the_error_reported_is_that_of_the_cut() -> None:
    update = random_update(9, 8, 6, dtype=torch.float64)
    compressed = ErrorRank(0.3, 8).compress(update, generator())
    assert 1 < compressed.update.rank < 6
    assert compressed.error == pytest.approx(distance(compressed.update, [update], [1.0]) / norm(update), rel=1e-9)


def test_an_error_below_rounding_keeps_what_is_there_and_no_more() -> None:
    update = random_update(9, 8, 2)
    doubled = LowRankUpdate(torch.cat([update.b, update.b], dim=1), torch.cat([update.a, update.a]))
    assert ErrorRank(1e-12, 8).compress(doubled, generator()).update.rank == 2


def test_a_small_error_of_a_large_dense_update_is_found_by_decomposing_it_whole() -> None:
    source = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(800, 12, generator=source))
    v, _ = torch.linalg.qr(torch.randn(770, 12, generator=source))
    values = torch.logspace(0, -4, 12)
    compressed = ErrorRank(5e-4, 770, first_guess=4).compress(DenseUpdate((u * values) @ v.T), generator())
    assert compressed.spectrum.complete
    assert compressed.update.rank == 10  # 10 values are above 5e-4, of which the tenth is 5.3e-4


@pytest.mark.parametrize("policy", [EnergyRank(0.9, 6, accepted=(1, 4, 8)), ErrorRank(0.3, 6, accepted=(1, 4, 8))])
def test_directions_up_to_the_next_accepted_rank_are_used(policy: EnergyRank | ErrorRank) -> None:
    # Two directions hold 25/29 of the energy and three 29/29, so three are asked for.
    assert policy.compress(diagonal(4.0, 3.0, 2.0, 0.1, 0.1, 0.1), generator()).update.rank == 4


def test_a_rank_above_every_accepted_one_is_what_it_is() -> None:
    assert EnergyRank(1.0, 4, accepted=(1, 2)).compress(diagonal(4.0, 3.0, 2.0), generator()).update.rank == 3


@pytest.mark.parametrize(
    ("rank", "accepted", "expected"),
    [
        *((rank, VLLM_RANKS, up) for rank, up in ((1, 1), (2, 8), (8, 8), (257, 320), (512, 512), (513, None))),
        *((rank, (4, 6), up) for rank, up in ((1, 4), (5, 6), (7, None))),
        (513, (), 513),
    ],
)
def test_a_rank_snaps_to_the_next_accepted_one(rank: int, accepted: tuple[int, ...], expected: int | None) -> None:
    assert snapped(rank, accepted) == expected


def test_a_budget_buys_from_all_of_a_low_rank_update_and_the_depth_of_a_dense_one() -> None:
    update = random_update(9, 8, 6)
    low = BudgetRank(8, 2).compress(update, generator())
    assert low.update is update
    assert low.spectrum.complete
    large = DenseUpdate(densify(random_update(800, 790, 40)))
    assert BudgetRank(790, 4).compress(large, generator()).update.rank == 4
    assert BudgetRank(790, 4).to_depth(8).compress(large, generator()).update.rank == 8
    assert BudgetRank(790, 4).to_depth(3) == BudgetRank(790, 4)
    assert BudgetRank(3, 4).compress(DenseUpdate(torch.eye(3)), generator()).update.rank == 3


@pytest.mark.parametrize("dense", [False, True])
def test_an_update_that_is_kept_whole_is_the_update_itself(dense: bool) -> None:
    low = random_update(9, 7, 3, dtype=torch.float64)
    update = DenseUpdate(densify(low)) if dense else low
    found = WholeRank().compress(update, torch.Generator())
    assert found.update is update
    assert (found.rank, found.kept_energy, found.error) == (None if dense else 3, 1.0, 0.0)
    assert found.spectrum.energy == pytest.approx(float(densify(low).square().sum()))
    assert WholeRank().planned is None
    assert (found.spectrum.rank_for(0.99) is None) == dense
