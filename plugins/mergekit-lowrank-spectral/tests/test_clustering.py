from __future__ import annotations

import pytest
import torch
import transcriptions
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_lowrank_spectral.clustering import mean_weights
from torch import Tensor


def members(points: Tensor, clusters: int, iterations: int = 300) -> list[list[int]]:
    weights = mean_weights(points @ points.T, clusters, iterations)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(weights.shape[0]).double())
    return [row.nonzero().flatten().tolist() for row in weights]


def line(*positions: float) -> Tensor:
    return torch.tensor([positions]).double().T


def test_two_groups_are_told_apart() -> None:
    assert sorted(members(line(0.0, 10.0, 1.0, 11.0), 2)) == [[0, 2], [1, 3]]


def test_one_cluster_holds_everything() -> None:
    assert members(line(0.0, 10.0, 1.0), 1) == [[0, 1, 2]]


def test_the_first_seed_is_the_medoid() -> None:
    # Without a round of Lloyd's algorithm a cluster is what is nearest to its seed; 4 is the medoid, then 20.
    assert sorted(members(line(0.0, 4.0, 5.0, 20.0), 2, 1)) == [[0, 1, 2], [3]]


def test_points_that_coincide_share_a_cluster_even_where_more_are_asked_for() -> None:
    assert sorted(members(line(1.0, 1.0, 5.0, 5.0), 4)) == [[0, 1], [2, 3]]


def test_rounds_move_points_to_the_nearest_mean() -> None:
    # The seeds 3 and 8 split at 5.5 into {0, 3, 5} and {8, 9}; nothing moves after that.
    positions = line(0.0, 3.0, 5.0, 8.0, 9.0)
    assert sorted(members(positions, 2)) == sorted(transcriptions.k_means(positions.numpy(), 2, 300))


@settings(max_examples=40)
@given(points=st.integers(1, 12), dimension=st.integers(1, 4), clusters=st.integers(1, 6), seed=st.integers(0, 999))
def test_it_is_k_means_on_the_points_themselves(points: int, dimension: int, clusters: int, seed: int) -> None:
    cloud = torch.randn(points, dimension, generator=torch.Generator().manual_seed(seed)).double()
    assert sorted(members(cloud, clusters)) == sorted(transcriptions.k_means(cloud.numpy(), clusters, 300))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_points_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cloud, order = torch.randn(20, 6, generator=generator).double(), torch.randperm(20, generator=generator)
    turned = [sorted(int(order[i]) for i in group) for group in members(cloud[order], 5)]
    assert sorted(turned) == sorted(members(cloud, 5))
