from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace
from mergekit_lowrank.strategies import Ties
from mergekit_lowrank.strategies.sparse import Election
from mergekit_lowrank.strategies.stages import (
    disjoint_max,
    disjoint_mean,
    elect_sign,
    keep_agreeing,
    nonzeros,
    trim_by_magnitude,
    trim_outliers,
    weighted_sum,
    zeros,
)
from mergekit_lowrank.testing import merge_updates, random_update

VALUES = torch.tensor([[[4.0, -1.0, 2.0], [0.0, 3.0, -2.0]], [[1.0, -5.0, -2.0], [0.0, -0.5, 4.0]]])


def stacks() -> st.SearchStrategy[Tensor]:
    """Up to four small matrices of whole numbers: many ties, zeros and votes that cancel, and exact sums."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
    return arrays("float64", shapes, elements=st.integers(-3, 3).map(float)).map(torch.from_numpy)


def ones() -> Tensor:
    return torch.ones(2, 1, 1)


def test_trim_keeps_entries_at_and_above_the_threshold_of_their_input() -> None:
    expected = [[[4.0, 0.0, 2.0], [0.0, 3.0, -2.0]], [[0.0, -5.0, 0.0], [0.0, 0.0, 4.0]]]
    assert trim_by_magnitude(VALUES, [2.0, 4.0]).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trim_at_threshold_zero_keeps_all_even_the_smallest_denormals(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([[tiny, -tiny, 0.0, 1.0]], dtype=dtype)
    assert torch.equal(trim_by_magnitude(values, [0.0]), values)
    assert torch.equal(trim_by_magnitude(values, [tiny]), values)


def test_trim_at_the_largest_magnitude_keeps_exactly_its_ties() -> None:
    kept = trim_by_magnitude(torch.tensor([[0.1, -0.3, 0.3, 0.2]]), [float(torch.tensor(0.3))])
    assert torch.equal(kept, torch.tensor([[0.0, -0.3, 0.3, 0.0]]))


def test_elect_by_total_takes_the_sign_of_the_sum() -> None:
    assert elect_sign(VALUES).tolist() == [[1.0, -1.0, 0.0], [0.0, 1.0, 1.0]]


def test_elect_by_frequency_takes_the_sign_of_the_count() -> None:
    assert elect_sign(VALUES, "frequency").tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


@given(values=stacks(), coefficients=st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_a_weighted_sum_is_the_plain_one(values: Tensor, coefficients: list[float]) -> None:
    own = torch.tensor(coefficients[: len(values)], dtype=torch.float64).view(-1, 1, 1)
    torch.testing.assert_close(weighted_sum(values, own), (values * own).sum(dim=0))
    assert torch.equal(weighted_sum(values.mT, values.new_ones(len(values))), values.mT.sum(dim=0))


@given(values=stacks())
def test_entries_are_zero_or_not(values: Tensor) -> None:
    assert torch.equal(nonzeros(values), (values != 0).double())
    assert torch.equal(zeros(values), (values == 0).double())


@given(values=stacks(), limits=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4))
def test_trims_are_selections_also_in_place(values: Tensor, limits: list[float]) -> None:
    own = torch.tensor(limits[: len(values)], dtype=torch.float64).view(-1, 1, 1)
    for trim, kept in ((trim_by_magnitude, values.abs() >= own), (trim_outliers, values.abs() <= own)):
        expected = torch.where(kept, values, 0)
        assert torch.equal(trim(values, limits[: len(values)]), expected)
        written = values.clone()
        assert trim(written, limits[: len(values)], out=written) is written
        assert torch.equal(written, expected)


@given(values=stacks(), undecided=st.sampled_from([-1, 0, 1]), method=st.sampled_from(["total", "frequency"]))
def test_an_election_equals_its_formula(values: Tensor, undecided: int, method: Literal["total", "frequency"]) -> None:
    votes = values if method == "total" else values.sign()
    elected = votes.sum(dim=0).sign()
    expected = torch.where(elected == 0, float(undecided), elected)
    election = Election(method, undecided)
    sign, agreeing = election.hold(values.clone())
    assert torch.equal(sign, expected)
    assert torch.equal(agreeing * sign, torch.where(values.sign() == expected, values, 0) * sign.abs())
    assert election.total == int(elected.sum())
    if undecided:
        assert election.cancelled == bool(((elected == 0) & (values != 0).any(dim=0)).any())


def test_keep_agreeing_zeroes_what_differs_from_the_elected_sign() -> None:
    sign = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, 0.0]])
    expected = [[[4.0, -1.0, 0.0], [0.0, 3.0, 0.0]], [[1.0, -5.0, -2.0], [0.0, 0.0, 0.0]]]
    assert keep_agreeing(VALUES, sign).tolist() == expected


def test_keep_agreeing_takes_a_sign_for_each_input() -> None:
    sign = torch.ones(2, 2, 3) * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    expected = [[[4.0, 0.0, 2.0], [0.0, 3.0, 0.0]], [[0.0, -5.0, -2.0], [0.0, -0.5, 0.0]]]
    assert keep_agreeing(VALUES, sign).tolist() == expected


def test_disjoint_mean_divides_by_the_kept_entries_only() -> None:
    kept = torch.tensor([[[4.0, 0.0, 0.0]], [[2.0, -3.0, 0.0]]])
    assert disjoint_mean(kept, ones(), ones()).tolist() == [[3.0, -3.0, 0.0]]


def test_disjoint_mean_divides_by_the_divisors_of_the_kept_entries() -> None:
    kept = torch.tensor([[[4.0, 0.0]], [[2.0, -3.0]]])
    weights = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    assert disjoint_mean(kept, weights, weights).tolist() == [[14 / 4, -3.0]]


def test_disjoint_mean_is_the_plain_total_where_divisors_cancel() -> None:
    kept = torch.tensor([[[4.0]], [[2.0]]])
    weights = torch.tensor([1.0, -1.0]).view(2, 1, 1)
    assert disjoint_mean(kept, weights, weights).tolist() == [[2.0]]


def test_disjoint_max_takes_the_largest_magnitude_with_its_sign() -> None:
    contributions = torch.tensor([[[4.0, -1.0, 0.0, 2.0]], [[2.0, -3.0, 0.0, -2.0]]])
    assert disjoint_max(contributions).tolist() == [[4.0, -3.0, 0.0, 2.0]]


def test_a_negative_weight_turns_its_input_round_under_disjoint_max() -> None:
    update = random_update(5, 4, 2)
    strategy = Ties(Ties.Params(density=1, disjoint="max", weighted_election=False))
    merged = merge_updates(strategy, DeltaSpace(DeltaSpace.Params()), [update], [-1.0])
    torch.testing.assert_close(densify(merged), -densify(update))


def test_no_stage_modifies_its_arguments() -> None:
    values, sign, weights = VALUES.clone(), elect_sign(VALUES), ones()
    before = sign.clone()
    trim_by_magnitude(values, [2.0, 4.0])
    elect_sign(values, "frequency")
    trim_outliers(values, [2.0, 4.0])
    keep_agreeing(values, sign)
    disjoint_mean(values, weights, weights)
    disjoint_max(values)
    assert torch.equal(values, VALUES)
    assert torch.equal(sign, before)
    assert torch.equal(weights, ones())
