from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import polar_factor
from mergekit_lowrank.testing import random_update

TOLERANCE = 1e-12


def test_a_positive_matrix_has_the_identity() -> None:
    torch.testing.assert_close(polar_factor(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), TOLERANCE), torch.eye(2))


def test_a_scaled_rotation_has_the_rotation() -> None:
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    torch.testing.assert_close(polar_factor(7 * rotation, TOLERANCE), rotation)


def test_two_columns_are_turned_away_from_each_other_by_the_same_angle() -> None:
    found = polar_factor(torch.tensor([[1.0, 0.6], [0.0, 0.8]]), TOLERANCE)
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0], [-1.0, 3.0]]) / math.sqrt(10))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_equal_vectors_share_one_direction(shape: tuple[int, int]) -> None:
    found = polar_factor(torch.ones(shape), TOLERANCE)
    torch.testing.assert_close(found, torch.full(shape, 1 / math.sqrt(3)))


def test_directions_up_to_the_tolerance_are_left_out() -> None:
    matrix = torch.diag(torch.tensor([-4.0, 1.0, 0.001]))
    torch.testing.assert_close(polar_factor(matrix, 1e-4), torch.diag(torch.tensor([-1.0, 1.0, 1.0])))
    torch.testing.assert_close(polar_factor(matrix, 1e-2), torch.diag(torch.tensor([-1.0, 1.0, 0.0])))


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (0, 3), (3, 0)])
def test_zero_has_zero(shape: tuple[int, int]) -> None:
    assert torch.equal(polar_factor(torch.zeros(shape), 0.0), torch.zeros(shape))


@settings(max_examples=40)
@given(d=st.integers(1, 8), n=st.integers(1, 8), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_is_a_partial_isometry_on_the_row_space_and_the_rest_is_positive(
    d: int, n: int, rank: int, seed: int
) -> None:
    update = random_update(d, n, rank, seed, dtype=torch.float64)
    matrix = update.b @ update.a
    found = polar_factor(matrix, 1e-10)
    torch.testing.assert_close(found @ found.T @ found, found)
    torch.testing.assert_close(found @ found.T @ matrix, matrix)
    positive = found.T @ matrix
    torch.testing.assert_close(positive, positive.T)
    assert float(torch.linalg.eigvalsh((positive + positive.T) / 2).min()) > -1e-9 * float(matrix.norm())
