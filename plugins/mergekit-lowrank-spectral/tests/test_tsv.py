from __future__ import annotations

import math

import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral import Tsv
from torch import Tensor

from mergekit_lowrank import LowRankUpdate, StrategyError
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import CoreSpace, DeltaSpace, SpaceParams
from mergekit_lowrank.testing import merge_updates, random_updates

CORE = CoreSpace(SpaceParams())


def merged(updates: list[LowRankUpdate], weights: list[float] | None = None, **parameters: float) -> Tensor:
    return densify(merge_updates(Tsv(Tsv.Params(**parameters)), CORE, updates, weights))


def one(left: list[float], right: list[float], value: float = 1.0) -> LowRankUpdate:
    return LowRankUpdate(torch.tensor([left]).T, torch.tensor([right]), value)


APART = [one([1.0, 0.0, 0.0], [1.0, 0.0], 3.0), one([0.0, 1.0, 0.0], [0.0, 1.0], 2.0)]


def test_inputs_with_orthogonal_directions_are_added_up() -> None:
    torch.testing.assert_close(merged(APART), torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))


def test_directions_that_overlap_are_turned_away_from_each_other_symmetrically() -> None:
    # The polar factor of [(1, 0), (3/5, 4/5)] is [(3, -1), (1, 3)] / √10.
    overlapping = [one([1.0, 0.0], [1.0, 0.0], math.sqrt(10)), one([0.6, 0.8], [0.0, 1.0], math.sqrt(10))]
    torch.testing.assert_close(merged(overlapping), torch.tensor([[3.0, 1.0], [-1.0, 3.0]]))


def test_a_weight_multiplies_its_input() -> None:
    torch.testing.assert_close(merged(APART, [0.5, -1.0]), torch.tensor([[1.5, 0.0], [0.0, -2.0], [0.0, 0.0]]))


def test_copies_of_one_input_count_once() -> None:
    (update,) = random_updates(12, 10, [3], dtype=torch.float64)
    torch.testing.assert_close(merged([update] * 3), densify(update))


def test_copies_that_only_rounding_and_the_gauge_tell_apart_count_once() -> None:
    (update,) = random_updates(40, 30, [4])
    turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    turned = LowRankUpdate(update.b @ turn, torch.linalg.solve(turn, update.a))
    torch.testing.assert_close(merged([update, turned]), densify(update), rtol=0, atol=1e-4)


def test_each_input_keeps_its_share_of_the_joint_directions() -> None:
    updates = random_updates(20, 20, [6, 2], dtype=torch.float64)
    deltas = [densify(u).numpy() for u in updates]
    # Of R = 8 directions each of two inputs may keep four.
    expected = transcriptions.tsv([transcriptions.truncated(deltas[0], 4), deltas[1]], 8, 1.0, 1e-9)
    torch.testing.assert_close(merged(updates), torch.from_numpy(expected))


def test_at_least_one_direction_is_kept() -> None:
    # int(2 * 0.3) = 0.
    torch.testing.assert_close(merged(APART, rank_share=0.3), merged(APART))


def test_the_lossless_variant_keeps_every_direction() -> None:
    updates = random_updates(20, 20, [6, 2], dtype=torch.float64)
    expected = transcriptions.tsv([densify(u).numpy() for u in updates], 8, 1.0, 1e-9)
    torch.testing.assert_close(merged(updates, rank_share=1.0), torch.from_numpy(expected))


@pytest.mark.parametrize(("tolerance", "least", "most"), [(1e-5, 0.0, 1e-6), (0.0, 0.01, 10.0)])
def test_directions_below_the_tolerance_do_not_count(tolerance: float, least: float, most: float) -> None:
    first, second = random_updates(12, 10, [2, 2], dtype=torch.float64)
    noise = 1e-9 * torch.ones(12, 1, dtype=torch.float64)
    noisy = LowRankUpdate(torch.cat([first.b, noise], dim=1), torch.cat([first.a, noise[:10].T]))
    clean, found = ([u, second] for u in (first, noisy))
    change = merged(found, rank_share=1.0, rank_tolerance=tolerance) - merged(clean, rank_share=1.0)
    assert least <= float(change.abs().max()) <= most


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    share=st.sampled_from([None, 0.5, 1.0]),
)
def test_it_is_the_dense_formula(d_out: int, d_in: int, ranks: list[int], seed: int, share: float | None) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    weights = [0.5 + t for t in range(len(ranks))]
    deltas = [w * densify(u).numpy() for w, u in zip(weights, updates, strict=True)]
    directions = min(sum(ranks), d_out, d_in)
    expected = torch.from_numpy(transcriptions.tsv(deltas, directions, share, 1e-5))
    found = densify(merge_updates(Tsv(Tsv.Params(rank_share=share)), CORE, updates, weights))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize(("share", "promised"), [(None, True), (1.0, True), (0.5, False)])
def test_one_input_comes_back_where_it_keeps_every_direction(share: float | None, promised: bool) -> None:
    assert Tsv(Tsv.Params(rank_share=share)).returns_single_input() is promised


def test_it_refuses_coordinates_of_another_space() -> None:
    with pytest.raises(StrategyError, match="'tsv' works in space 'core', not in DeltaCoordinates"):
        merge_updates(Tsv(Tsv.Params()), DeltaSpace(SpaceParams()), APART)
