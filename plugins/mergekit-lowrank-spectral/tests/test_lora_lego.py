from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral import LoraLego

from mergekit_lowrank import LowRankUpdate, StrategyError
from mergekit_lowrank.lowrank import concatenate, densify
from mergekit_lowrank.spaces import DeltaSpace, FactorSpace, SpaceParams
from mergekit_lowrank.testing import merge_updates, random_update, random_updates


def merged(updates: list[LowRankUpdate], weights: list[float] | None = None, **parameters: Any) -> LowRankUpdate:
    strategy = LoraLego(LoraLego.Params(**parameters))
    update = merge_updates(strategy, FactorSpace(SpaceParams()), updates, weights)
    assert isinstance(update, LowRankUpdate)
    return update


def unit(a: list[float], b: list[float]) -> LowRankUpdate:
    return LowRankUpdate(torch.tensor([b]).T, torch.tensor([a]))


PAIR = [unit([4.0, 0.0], [0.0, 2.0]), unit([2.0, 0.0], [0.0, 4.0])]


@pytest.mark.parametrize(
    ("reweighting", "expected"),
    # The mean is a = (3, 0), b = (0, 3); the members' norms are 4, or √20 against the mean's √18.
    [("none", 9.0), ("max", 16.0), ("euclidean", 10.0)],
)
def test_the_mean_of_a_cluster_is_raised_to_the_norm_of_its_members(reweighting: str, expected: float) -> None:
    found = merged(PAIR, parameter_reweighting=reweighting)
    torch.testing.assert_close(densify(found), torch.tensor([[0.0, 0.0], [expected, 0.0]]))


def test_units_that_are_far_apart_stay_apart() -> None:
    far = [unit([4.0, 0.0], [1.0, 0.0]), unit([0.0, 4.0], [0.0, 1.0])]
    found = merged(far, clusters=2, output_reweighting=False)
    torch.testing.assert_close(densify(found), 4 * torch.eye(2))


def test_the_result_is_scaled_by_the_root_of_mean_rank_over_rank() -> None:
    updates = random_updates(9, 8, [1, 3], dtype=torch.float64)
    plain = densify(merged(updates, clusters=4, output_reweighting=False))
    torch.testing.assert_close(densify(merged(updates, clusters=4)), plain * math.sqrt(2 / 4))


def test_as_many_clusters_as_units_are_the_sum() -> None:
    updates = random_updates(9, 8, [1, 3], scalings=[2.0, 0.5], dtype=torch.float64)
    found = merged(updates, [0.5, -1.0], clusters=9, output_reweighting=False)
    assert found.rank == 4
    torch.testing.assert_close(densify(found), densify(concatenate(updates, [0.5, -1.0])))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_one_input_comes_back(rank: int) -> None:
    assert LoraLego(LoraLego.Params()).returns_single_input()
    assert not LoraLego(LoraLego.Params(clusters=2)).returns_single_input()
    update = random_update(9, 8, rank, scaling=2.0, dtype=torch.float64)
    torch.testing.assert_close(densify(merged([update])), densify(update))


def test_copies_of_one_input_come_back_once() -> None:
    update = random_update(9, 8, 3, scaling=2.0, dtype=torch.float64)
    torch.testing.assert_close(densify(merged([update] * 3)), densify(update))


def test_padding_and_silent_components_are_no_units() -> None:
    first, second = random_updates(9, 8, [2, 2], dtype=torch.float64)
    zeros = torch.zeros(9, 2, dtype=torch.float64)
    padded = LowRankUpdate(torch.cat([first.b, zeros], dim=1), torch.cat([first.a, torch.ones(2, 8).double()]))
    found = merged([padded, second])
    assert found.rank == 2
    torch.testing.assert_close(densify(found), densify(merged([first, second])))


def test_an_input_of_weight_zero_takes_no_part() -> None:
    first, second, third = random_updates(9, 8, [2, 2, 3], dtype=torch.float64)
    found = merged([first, third, second], [1.0, 0.0, 1.0])
    torch.testing.assert_close(densify(found), densify(merged([first, second])))


def test_zero_inputs_merge_to_zero() -> None:
    zero = LowRankUpdate(torch.zeros(3, 2), torch.ones(2, 4))
    assert torch.equal(densify(merged([zero, zero])), torch.zeros(3, 4))


def test_units_that_cancel_to_rounding_are_zero() -> None:
    opposed = [unit([1.0, 0.0], [0.0, 1.0]), unit([-1.0, 0.0], [0.0, -1.0])]
    assert torch.equal(densify(merged(opposed, clusters=1)), torch.zeros(2, 2))


@settings(max_examples=40)
@given(
    d_out=st.integers(2, 7),
    d_in=st.integers(2, 7),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    clusters=st.integers(1, 5),
    norm=st.sampled_from(["max", "euclidean", "none"]),
)
def test_it_is_the_formula_on_the_units(
    d_out: int, d_in: int, ranks: list[int], seed: int, clusters: int, norm: str
) -> None:
    scalings = [0.5 + t for t in range(len(ranks))]
    updates = random_updates(d_out, d_in, ranks, seed, scalings=scalings, dtype=torch.float64)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    units = []
    for update, weight in zip(updates, weights, strict=True):
        root = math.sqrt(abs(weight * update.scaling))
        a, b = update.a * math.copysign(root, weight), update.b.T * root
        units.append(torch.cat([a, b], dim=1).numpy())
    order = {"max": np.inf, "euclidean": 2, "none": None}[norm]
    expected = torch.from_numpy(transcriptions.lora_lego(units, d_in, clusters, norm=order))
    strategy = merged(updates, weights, clusters=clusters, parameter_reweighting=norm, output_reweighting=False)
    torch.testing.assert_close(densify(strategy), expected)


def test_it_refuses_coordinates_of_another_space() -> None:
    with pytest.raises(StrategyError, match="'lora_lego' works in space 'factors', not in DeltaCoordinates"):
        merge_updates(LoraLego(LoraLego.Params()), DeltaSpace(SpaceParams()), PAIR)
