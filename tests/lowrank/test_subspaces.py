from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, concatenate, densify
from mergekit_lowrank.lowrank.subspaces import joint_directions, principal_angles, turned_cosines
from mergekit_lowrank.testing import random_update, random_updates

D_OUT, D_IN = 23, 17
DOUBLE = torch.float64


def basis(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_update(rows, 1, columns, seed, dtype=DOUBLE).b).Q


def update_of(left: Tensor, values: Sequence[float], right: Tensor, dtype: torch.dtype = DOUBLE) -> LowRankUpdate:
    """left · diag(values) · rightᵀ, written with factors that do not show it."""
    mixed = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    b, a = left * torch.tensor(values, dtype=DOUBLE) @ mixed, torch.linalg.solve(mixed, right.T)
    return LowRankUpdate((b / 2).to(dtype), a.to(dtype), 2.0)


def dense_cosines(merged: Tensor, update: Tensor, weight: float = 1.0) -> Tensor:
    """What ``turned_cosines`` means, from whole matrices."""
    u, s, vh = torch.linalg.svd(update.double() * weight)
    rank = int((s > 1e-5 * s[0]).sum())
    found = []
    for i in range(rank):
        image, back = merged @ vh[i], merged.T @ u[:, i]
        found.append((image @ u[:, i] / image.norm() + back @ vh[i] / back.norm()) / 2)
    return torch.stack(found)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-3, 0.3, 1.2, math.pi / 2 - 1e-9])
def test_an_angle_keeps_its_digits_however_small_it_is(angle: float) -> None:
    whole = basis(D_OUT, 4)
    tilted = whole[:, :1] * math.cos(angle) + whole[:, 2:3] * math.sin(angle)
    other = torch.cat([tilted, whole[:, 3:4]], dim=1)
    first, second = principal_angles(whole[:, :2], other).tolist()
    assert first == pytest.approx(angle, abs=1e-15, rel=1e-3)
    assert second == pytest.approx(math.pi / 2, abs=1e-12)


def test_angles_of_spaces_of_unequal_size_are_those_of_the_smaller() -> None:
    whole = basis(D_OUT, 6)
    assert principal_angles(whole[:, :4], whole[:, 3:5]).tolist() == pytest.approx([0, math.pi / 2], abs=1e-12)
    assert principal_angles(whole[:, 3:5], whole[:, :4]).tolist() == pytest.approx([0, math.pi / 2], abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99), double=st.booleans())
def test_directions_are_those_of_the_dense_deltas(ranks: list[int], seed: int, double: bool) -> None:
    updates = random_updates(D_OUT, D_IN, ranks, seed, dtype=DOUBLE if double else torch.float32)
    joint = joint_directions(updates)
    deltas = [densify(u).double() for u in updates]
    for own, rank, delta in zip(joint.updates, ranks, deltas, strict=True):
        assert own.rank == rank
        assert own.values.tolist() == pytest.approx(torch.linalg.svdvals(delta)[:rank].tolist(), rel=1e-5)
    products = [[float((s * t).sum()) for t in deltas] for s in deltas]
    for row, expected in zip(joint.inner_products().tolist(), products, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-4)
    weights = [0.5 - t for t in range(len(ranks))]
    total = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    assert isinstance(total, Tensor)
    count = min(sum(ranks), D_IN)
    expected_values = torch.linalg.svdvals(total)[:count].tolist()
    assert joint.weighted_values(weights)[:count].tolist() == pytest.approx(expected_values, rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_other_factors_of_the_same_update_have_the_same_directions(seed: int, scale: float) -> None:
    updates = random_updates(D_OUT, D_IN, [3, 4, 2], seed, dtype=DOUBLE)
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) + 4 * torch.eye(4)
    other = [*updates]
    other[1] = LowRankUpdate(updates[1].b @ mixed * scale, torch.linalg.solve(mixed, updates[1].a), 1 / scale)
    for first, second in zip(measures(updates), measures(other), strict=True):
        assert torch.allclose(first, second, atol=1e-9, equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(4)), seed=st.integers(0, 9))
def test_the_order_of_the_updates_is_that_of_the_results(order: list[int], seed: int) -> None:
    updates = random_updates(D_OUT, D_IN, [3, 1, 4, 2], seed, dtype=DOUBLE)
    for first, second in zip(measures(updates), measures([updates[t] for t in order]), strict=True):
        assert torch.allclose(first[order][:, order], second, atol=1e-9)


def test_a_scale_changes_no_measure_of_directions() -> None:
    updates = random_updates(D_OUT, D_IN, [3, 4], dtype=DOUBLE)
    other = [updates[0].scaled(-1e4), updates[1].scaled(1e-3)]
    for first, second in zip(measures(updates), measures(other), strict=True):
        assert torch.allclose(first, second, atol=1e-9)


def measures(updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    joint = joint_directions(updates)
    tables = []
    for side in (joint.left, joint.right):
        tables += [joint.overlaps(side), joint.smallest_angles(side), joint.alignments(side, 0.05)]
    return tables


def test_the_numerical_rank_counts_what_is_above_rounding() -> None:
    repeated = random_update(D_OUT, D_IN, 2, dtype=torch.float32)
    twice = LowRankUpdate(torch.cat([repeated.b] * 2, dim=1), torch.cat([repeated.a] * 2))
    (own,) = joint_directions([twice]).updates
    assert own.rank == 2
    assert own.values.tolist() == pytest.approx(torch.linalg.svdvals(densify(twice).double())[:2].tolist(), rel=1e-5)


def test_a_zero_update_has_no_directions_and_no_measures() -> None:
    zero = LowRankUpdate(torch.zeros(D_OUT, 3), torch.randn(3, D_IN))
    joint = joint_directions([random_update(D_OUT, D_IN, 2), zero])
    assert [own.rank for own in joint.updates] == [2, 0]
    for side in (joint.left, joint.right):
        for table in (joint.overlaps(side), joint.smallest_angles(side), joint.alignments(side, 0.05)):
            assert table.isnan().tolist() == [[False, True], [True, True]]
    assert joint.inner_products()[1].tolist() == [0, 0]


def test_alignment_is_the_share_of_the_norm_in_the_leading_directions_of_the_other() -> None:
    left, right = basis(D_OUT, 3), basis(D_IN, 4, 1)
    leads = update_of(left[:, :2], [100, 1], right[:, :2])  # the second is below 5 %, so it leads nowhere
    other = update_of(left[:, :2], [4, 3], right[:, 1:3])
    joint = joint_directions([leads, other])
    held = math.hypot(100, 1)
    columns = joint.alignments(joint.left, 0.05).tolist()
    assert columns[0] == pytest.approx([100 / held, 1])
    assert columns[1] == pytest.approx([0.8, 1])
    rows = joint.alignments(joint.right, 0.05).tolist()
    assert rows[0] == pytest.approx([100 / held, 1 / held])
    assert rows[1] == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("is_dense", [False, True])
def test_directions_of_orthogonal_updates_stay_in_their_sum(dtype: torch.dtype, is_dense: bool) -> None:
    left, right = basis(D_OUT, 5), basis(D_IN, 5, 1)
    updates = [
        update_of(left[:, :3], [9, 3, 1], right[:, :3], dtype),
        update_of(left[:, 3:], [50, 0.5], right[:, 3:], dtype),
    ]
    merged = concatenate(updates, [1.0, -2.0])
    found = turned_cosines(DenseUpdate(densify(merged)) if is_dense else merged, joint_directions(updates), [1.0, -2.0])
    assert found.tolist() == pytest.approx([1.0] * 5, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    weight=st.sampled_from([-0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
    double=st.booleans(),
    is_dense=st.booleans(),
)
def test_turned_cosines_are_those_of_the_dense_matrices(
    ranks: list[int], weight: float, seed: int, double: bool, is_dense: bool
) -> None:
    *updates, merged = random_updates(D_OUT, D_IN, [*ranks, 3], seed, dtype=DOUBLE if double else torch.float32)
    weights = [weight] * len(ranks)
    found = turned_cosines(DenseUpdate(densify(merged)) if is_dense else merged, joint_directions(updates), weights)
    expected = torch.cat([dense_cosines(densify(merged).double(), densify(u), weight) for u in updates])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-4 if not double else 1e-9)


def test_one_direction_among_others_is_turned_by_what_they_add_to_it() -> None:
    left, right = basis(D_OUT, 2), basis(D_IN, 2, 1)
    update = update_of(left[:, :1], [3], right[:, :1])
    disturbed = concatenate([update, update_of(left[:, 1:], [4], right[:, :1])], [1.0, 1.0])
    # v is sent to 3u + 4u', whose cosine with u is 0.6; u is sent back to v alone.
    assert turned_cosines(disturbed, joint_directions([update]), [1.0]).tolist() == pytest.approx([0.8])


@pytest.mark.parametrize("is_dense", [False, True])
def test_what_cancels_has_no_direction(is_dense: bool) -> None:
    update = random_update(D_OUT, D_IN, 3)
    merged = concatenate([update, update], [1.0, -1.0])
    joint = joint_directions([update, update.scaled(-1.0)])
    found = turned_cosines(DenseUpdate(densify(merged)) if is_dense else merged, joint, [1.0, 1.0])
    assert found.isnan().all()


def test_a_weight_of_zero_has_no_direction_and_a_negative_one_turns_it_round() -> None:
    update = random_update(D_OUT, D_IN, 2)
    joint = joint_directions([update, update])
    found = turned_cosines(update, joint, [0.0, -1.0])
    assert found[:2].isnan().all()
    assert found[2:].tolist() == pytest.approx([-1, -1], abs=1e-5)
