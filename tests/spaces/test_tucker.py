"""The Tucker-2 subspace of Compress-then-Merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import TuckerCoordinates, TuckerParams, TuckerSpace
from mergekit_lowrank.strategies import Linear, Ties
from mergekit_lowrank.testing import merge_updates, random_update, random_updates
from tests.strategies import dense


def added(updates: list[LowRankUpdate], **parameters: float) -> torch.Tensor:
    return densify(
        merge_updates(Linear(Linear.Params(normalize=False)), TuckerSpace(TuckerParams(**parameters)), updates)
    )


@settings(max_examples=25)
@given(rank=st.integers(1, 4), balance=st.sampled_from([0.0, 0.25, 1.0]), seed=st.integers(0, 50))
def test_the_captured_energy_is_that_of_the_dense_alternation(rank: int, balance: float, seed: int) -> None:
    updates = random_updates(8, 7, [2, 1, 3], seed, scalings=[1.0, 3.0, 0.5], dtype=torch.float64)
    deltas = torch.stack([densify(u) for u in updates])
    coordinates = TuckerSpace(TuckerParams(subspace_rank=rank, norm_balance=balance)).encode(updates, [1.0] * 3)
    assert isinstance(coordinates, TuckerCoordinates)
    norms = deltas.flatten(1).norm(dim=1)
    scaled = deltas * ((balance * norms + (1 - balance) * norms.mean()) / norms).view(-1, 1, 1)

    def captured(u: torch.Tensor, v: torch.Tensor) -> float:
        return float((u.T @ scaled @ v).square().sum())

    theirs = dense.tucker_bases(scaled.numpy(), rank)
    found = captured(coordinates.left, coordinates.right.T)
    best = captured(*(torch.from_numpy(basis) for basis in theirs))
    # Alternations may end in different local optima; neither may be worse than the other by more than a little.
    assert found == pytest.approx(best, rel=0.02)


def test_the_bases_are_those_of_the_dense_alternation() -> None:
    updates = random_updates(8, 7, [2, 1, 3], 4, scalings=[1.0, 3.0, 0.5], dtype=torch.float64)
    found = added(updates, subspace_rank=2, norm_balance=0.25)
    expected = dense.tucker(torch.stack([densify(u) for u in updates]).numpy(), 2, 0.25)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3 * float(found.abs().max()))


def test_one_update_of_no_higher_rank_comes_back() -> None:
    update = random_update(9, 7, 3, scaling=2.0, dtype=torch.float64)
    torch.testing.assert_close(added([update]), densify(update))


def test_copies_come_back_as_their_sum() -> None:
    update = random_update(9, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(added([update] * 3), 3 * densify(update))


def test_bases_as_large_as_the_joint_rank_lose_nothing() -> None:
    updates = random_updates(12, 11, [2, 3], dtype=torch.float64)
    torch.testing.assert_close(added(updates, subspace_rank=5), densify(updates[0]) + densify(updates[1]))


def test_a_zero_update_does_not_count() -> None:
    first, second = random_updates(9, 7, [2, 2], dtype=torch.float64)
    zero = LowRankUpdate(torch.zeros_like(first.b), first.a)
    torch.testing.assert_close(added([first, zero, second]), added([first, second]))
    assert bool((added([zero, zero]) == 0).all())


def test_a_large_update_does_not_drown_the_others_where_norms_are_balanced() -> None:
    large, small = (
        random_update(20, 20, 2, 1, dtype=torch.float64).scaled(100),
        random_update(20, 20, 2, 2, dtype=torch.float64),
    )

    def kept(balance: float) -> float:
        coordinates = TuckerSpace(TuckerParams(norm_balance=balance)).encode([large, small], [1.0, 1.0])
        own = coordinates.parts[0].read(slice(None))[1]
        return float(own.square().sum() / densify(small).square().sum())

    assert kept(0.0) > 2 * kept(1.0)


def test_the_result_has_the_rank_of_the_bases() -> None:
    updates = random_updates(20, 16, [4, 4, 4])
    found = merge_updates(Ties(Ties.Params()), TuckerSpace(TuckerParams(subspace_rank=3)), updates)
    assert isinstance(found, LowRankUpdate)
    assert (found.rank, found.a.dtype) == (3, torch.float32)


def test_the_signs_of_the_bases_are_fixed() -> None:
    updates = random_updates(9, 7, [2, 3])
    coordinates = TuckerSpace(TuckerParams()).encode(updates, [1.0, 1.0])
    assert isinstance(coordinates, TuckerCoordinates)
    for basis in (coordinates.left, coordinates.right.T):
        peaks = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        assert bool((peaks > 0).all())


def test_the_gauge_of_the_factors_does_not_matter() -> None:
    updates = random_updates(9, 7, [2, 3], dtype=torch.float64)
    turned = []
    for update in updates:
        mixing = torch.randn(update.rank, update.rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        turned.append(LowRankUpdate(update.b @ mixing, torch.linalg.solve(mixing, update.a)))
    space, strategy = TuckerSpace(TuckerParams()), Ties(Ties.Params())
    torch.testing.assert_close(
        densify(merge_updates(strategy, space, turned)), densify(merge_updates(strategy, space, updates))
    )
