from __future__ import annotations

import math

import pytest
import torch

from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.testing import random_update
from mergekit_lowrank.verification.comparing import (
    TOLERANCE,
    difference_of_factors,
    difference_of_roundings,
    half_gap,
    least_change,
)

NARROW = (torch.bfloat16, torch.float16, torch.float32)


def turned(update: LowRankUpdate) -> LowRankUpdate:
    """The same product of other factors."""
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64)).Q
    return LowRankUpdate(update.b.double() @ turn, turn.T @ update.a.double())


def as_type(update: LowRankUpdate, dtype: torch.dtype) -> LowRankUpdate:
    return LowRankUpdate(update.b.to(dtype), update.a.to(dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_factors_with_the_same_bits_are_identical_whatever_the_padding(dtype) -> None:
    own = random_update(7, 5, 2, dtype=dtype)
    padding = LowRankUpdate(torch.zeros(7, 3, dtype=dtype), torch.zeros(3, 5, dtype=dtype))
    padded = LowRankUpdate(torch.cat([own.b, padding.b], dim=1), torch.cat([own.a, padding.a]))
    found = difference_of_factors(padded, own)
    assert (found.error, found.is_identical, found.tolerance) == (0.0, True, TOLERANCE)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rank", [2, 8])
def test_other_factors_of_one_product_differ_by_no_more_than_rounding_may(dtype, rank) -> None:
    exact = random_update(48, 40, rank, seed=3, dtype=torch.float64)
    found = difference_of_factors(as_type(turned(exact), dtype), as_type(exact, dtype))
    assert found.error <= found.tolerance
    assert not found.is_identical
    if dtype == torch.bfloat16:  # without the bound of the rounding it would be a fault
        assert found.error > TOLERANCE


@pytest.mark.parametrize("dtype", NARROW)
def test_an_update_that_is_a_tenth_larger_is_beyond_the_tolerance(dtype) -> None:
    own = random_update(48, 40, 8, dtype=dtype)
    found = difference_of_factors(own.scaled(1.1), own)
    assert found.error == pytest.approx(0.1, rel=1e-6)
    assert found.error > found.tolerance


def test_the_error_is_that_of_the_dense_matrices_over_all_blocks() -> None:
    one, other = random_update(300, 700, 3, seed=1), random_update(300, 700, 4, seed=2)
    dense = [update.b.double() @ update.a.double() for update in (one, other)]
    expected = float((dense[0] - dense[1]).norm() / dense[1].norm())
    assert difference_of_factors(one, other).error == pytest.approx(expected, rel=1e-12)


def test_products_that_nearly_cancel_may_differ_more() -> None:
    b, a = torch.randn(20, 1, generator=torch.Generator().manual_seed(1)), torch.ones(1, 6)
    nearly = LowRankUpdate(torch.cat([b, -b * 0.99], dim=1).bfloat16(), torch.cat([a, a]).bfloat16())
    found = difference_of_factors(nearly.scaled(1.001), nearly)
    alone = difference_of_factors(as_type(LowRankUpdate(b, a), torch.bfloat16).scaled(1.001), nearly)
    assert found.tolerance > 0.5
    assert math.isfinite(alone.tolerance)


def test_where_zero_is_expected_anything_else_is_a_fault() -> None:
    zero, own = LowRankUpdate(torch.zeros(4, 2), torch.ones(2, 3)), random_update(4, 3, 2)
    assert difference_of_factors(own, zero).error == math.inf
    assert difference_of_factors(LowRankUpdate(torch.zeros(4, 1), torch.zeros(1, 3)), zero).error == 0
    assert difference_of_factors(zero, own).error == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, 1.5, -3.0, 0.1, 1e-5])
def test_half_the_gap_is_half_the_distance_to_the_next_number(dtype, value) -> None:
    own = torch.tensor([value], dtype=dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    after = (own.view(bits) + 1).view(dtype)  # away from zero
    assert float(half_gap(own)) == float((after.double() - own.double()).abs() / 2)


def test_the_gap_at_zero_is_that_of_the_least_number() -> None:
    assert float(half_gap(torch.zeros(1, dtype=torch.float16))) == 2.0**-25


def test_a_number_that_rounding_explains_is_no_change() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in NARROW:
        stored = exact.to(dtype)
        assert not least_change(stored.double(), exact, half_gap(stored)).any()
        wrong = (stored.double() * 1.05).to(dtype)
        assert least_change(wrong.double(), exact, half_gap(wrong)).count_nonzero() > 990


def test_what_is_not_finite_is_the_same_only_where_both_are() -> None:
    found = torch.tensor([math.nan, math.inf, math.nan, 1.0])
    expected = torch.tensor([math.nan, math.inf, 1.0, math.nan])
    change = least_change(found, expected, torch.zeros(4))
    assert change[:2].tolist() == [0, 0]
    assert change[2:].isnan().all()


def test_neighbours_are_roundings_of_one_number_and_others_are_not() -> None:
    own = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    neighbour = torch.tensor([[1.0078125, 2.0]], dtype=torch.bfloat16)
    other = torch.tensor([[1.03125, 2.0]], dtype=torch.bfloat16)
    found = difference_of_roundings([(neighbour, own)])
    assert (found.error, found.is_identical) == (0.0, False)
    assert difference_of_roundings([(other, own)]).error > TOLERANCE
    assert difference_of_roundings([(own, own), (own, own)]).is_identical
