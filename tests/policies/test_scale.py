from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import (
    DenseUpdate,
    LowRankUpdate,
    StreamedUpdate,
    Update,
    concatenate,
    densify,
    inner,
    overlaps,
)
from mergekit_lowrank.policies import AutoScale, FixedScale, RetentionScale, ScalePolicy, retained
from mergekit_lowrank.testing import random_update, random_updates


def unit(row: int, size: float = 1.0) -> LowRankUpdate:
    """A (3, 2) update with one entry, in the first column."""
    return LowRankUpdate(torch.eye(3)[:, row : row + 1] * size, torch.tensor([[1.0, 0.0]]))


def retention(merged: Update, updates: list[LowRankUpdate], weights: list[float]) -> float | None:
    return retained(overlaps(merged, updates), [inner(u, u) for u in updates], weights)


def mean(updates: list[LowRankUpdate], weights: list[float]) -> LowRankUpdate:
    return concatenate(updates, [w / sum(weights) for w in weights])


def test_a_fixed_scale_is_the_number_whatever_is_merged() -> None:
    assert FixedScale(0.3).scaling(unit(0), [unit(1)], [1.0]).factor == 0.3
    assert FixedScale().scaling(unit(0), [unit(1)], [1.0]).factor == 1.0


def test_the_retention_of_the_sum_of_orthogonal_inputs_is_one() -> None:
    updates = [unit(0), unit(1, 2.0)]
    assert retention(concatenate(updates, [1.0, 1.0]), updates, [1.0, 1.0]) == pytest.approx(1.0)


def test_the_retention_of_the_mean_of_orthogonal_inputs_is_one_over_their_number() -> None:
    updates = [unit(0), unit(1), unit(2)]
    assert retention(mean(updates, [1.0] * 3), updates, [1.0] * 3) == pytest.approx(1 / 3)


def test_a_negative_weight_counts_what_survives_of_the_opposite() -> None:
    updates = [unit(0), unit(1)]
    assert retention(concatenate(updates, [1.0, -1.0]), updates, [1.0, -1.0]) == pytest.approx(1.0)


def test_an_input_of_weight_zero_takes_no_part_in_retention() -> None:
    assert retention(unit(0), [unit(0), unit(1)], [1.0, 0.0]) == pytest.approx(1.0)


def test_zero_updates_take_no_part_in_retention() -> None:
    assert retention(unit(0), [unit(0), unit(1, 0.0)], [1.0, 1.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "weight"), [(0.0, 1.0), (1.0, 0.0)])
def test_retention_is_not_defined_without_any_input(size: float, weight: float) -> None:
    assert retention(unit(0), [unit(0, size)], [weight]) is None


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    data=st.data(),
    dense=st.booleans(),
)
def test_retention_follows_its_definition_on_dense_deltas(
    ranks: list[int], seed: int, data: st.DataObject, dense: bool
) -> None:
    numbers = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)
    weights = data.draw(st.lists(numbers, min_size=len(ranks), max_size=len(ranks)))
    updates = random_updates(7, 6, ranks, seed, scalings=weights[::-1], dtype=torch.float64)
    low = random_update(7, 6, 3, seed + 5000, dtype=torch.float64)
    merged: Update = DenseUpdate(densify(low)) if dense else low
    pairs = [(w, densify(u)) for w, u in zip(weights, updates, strict=True)]
    kept = sum(float((w * (densify(low) * d)).sum()) for w, d in pairs)
    whole = sum(float((abs(w) * d * d).sum()) for w, d in pairs)
    assert retention(merged, updates, weights) == pytest.approx(kept / whole, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), target=st.floats(0.3, 1.0))
def test_a_retention_scale_reaches_the_retention_asked_for(seed: int, target: float) -> None:
    updates = random_updates(9, 8, [2, 2, 2], seed, dtype=torch.float64)
    merged = mean(updates, [1.0] * 3)
    scaling = RetentionScale(target).scaling(merged, updates, [1.0] * 3)
    assert scaling.warning is None
    assert retention(merged.scaled(scaling.factor), updates, [1.0] * 3) == pytest.approx(target)


def test_auto_keeps_n_to_the_minus_two_fifths() -> None:
    updates = [unit(0), unit(1), unit(2)]
    scaling = AutoScale().scaling(mean(updates, [1.0] * 3), updates, [1.0] * 3)
    assert scaling.factor == pytest.approx(3 * 3**-0.4)


def test_auto_counts_only_inputs_with_a_weight_and_an_update() -> None:
    updates = [unit(0), unit(1), unit(2, 0.0), unit(2)]
    weights = [1.0, 1.0, 1.0, 0.0]
    scaling = AutoScale().scaling(concatenate(updates, weights), updates, weights)
    assert scaling.factor == pytest.approx(2**-0.4)


def test_auto_leaves_one_input_at_its_own_size() -> None:
    scaling = AutoScale().scaling(unit(0, 3.0), [unit(0, 3.0)], [1.0])
    assert scaling.factor == pytest.approx(1.0)
    assert scaling.warning is None


def test_auto_does_not_depend_on_the_size_a_method_gave_its_result() -> None:
    updates = random_updates(9, 8, [2, 2], dtype=torch.float64)
    merged = mean(updates, [1.0, 1.0])
    small, large = (AutoScale().scaling(merged.scaled(s), updates, [1.0, 1.0]).factor * s for s in (0.5, 2.0))
    assert small == pytest.approx(large)


POLICIES = [AutoScale(), RetentionScale(0.8)]


@pytest.mark.parametrize("policy", POLICIES, ids=["auto", "retention"])
def test_opposed_inputs_fall_back_to_one_with_a_warning(policy: ScalePolicy) -> None:
    updates = [unit(0), unit(0, -1.0)]
    scaling = policy.scaling(mean(updates, [1.0, 1.0]), updates, [1.0, 1.0])
    assert scaling.factor == 1.0
    assert scaling.warning is not None
    assert "the method's own scale is kept" in scaling.warning
    assert "outside [0.1, 10]" in scaling.warning


@pytest.mark.parametrize("policy", POLICIES, ids=["auto", "retention"])
def test_a_result_that_points_away_from_its_inputs_falls_back_to_one_with_a_warning(policy: ScalePolicy) -> None:
    scaling = policy.scaling(unit(0, -1.0), [unit(0)], [1.0])
    assert scaling.factor == 1.0
    assert scaling.warning is not None


@pytest.mark.parametrize(("size", "falls_back"), [(0.11, False), (0.09, True), (9.0, False), (11.0, True)])
def test_factors_outside_the_plausible_range_are_not_trusted(size: float, falls_back: bool) -> None:
    scaling = RetentionScale(1.0).scaling(unit(0, 1 / size), [unit(0)], [1.0])
    assert (scaling.warning is not None) == falls_back
    assert scaling.factor == (1.0 if falls_back else pytest.approx(size))


@pytest.mark.parametrize("policy", POLICIES, ids=["auto", "retention"])
def test_zero_inputs_keep_the_factor_one_without_a_warning(policy: ScalePolicy) -> None:
    scaling = policy.scaling(unit(0, 0.0), [unit(0, 0.0), unit(1, 0.0)], [1.0, 1.0])
    assert (scaling.factor, scaling.warning) == (1.0, None)


@pytest.mark.parametrize("policy", [AutoScale(), RetentionScale(0.5)], ids=["auto", "retention"])
@pytest.mark.parametrize("dense", [1, 3])
@pytest.mark.parametrize("merged_is_dense", [False, True])
def test_dense_inputs_are_scaled_as_their_factors_are(policy: ScalePolicy, dense: int, merged_is_dense: bool) -> None:
    updates = random_updates(9, 7, [2, 3, 1], dtype=torch.float64)
    merged = mean(updates, [1.0, 0.5, 2.0])
    given = [StreamedUpdate.of(densify(u)) if t < dense else u for t, u in enumerate(updates)]
    expected = policy.scaling(merged, updates, [1.0, 0.5, 2.0])
    found = policy.scaling(DenseUpdate(densify(merged)) if merged_is_dense else merged, given, [1.0, 0.5, 2.0])
    assert found.factor == pytest.approx(expected.factor, rel=1e-12)
    assert found.warning == expected.warning is None


def test_dense_zero_inputs_take_no_part_in_auto() -> None:
    delta = densify(random_update(9, 7, 2))
    given = [StreamedUpdate.of(delta), StreamedUpdate.of(torch.zeros(9, 7))]
    assert AutoScale().scaling(DenseUpdate(delta), given, [1.0, 1.0]).factor == pytest.approx(1.0)
