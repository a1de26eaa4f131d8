from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, StreamedUpdate, compare, concatenate, densify
from mergekit_lowrank.lowrank import comparison as comparison_module
from mergekit_lowrank.testing import random_update, random_updates
from mergekit_lowrank.testing.memory import held


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def dense_error(merged: LowRankUpdate, updates: list[LowRankUpdate], coefficients: list[float]) -> float:
    total = sum(c * densify(u) for c, u in zip(coefficients, updates, strict=True))
    return float((densify(merged) - total).norm() / total.norm())


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    coefficient=st.floats(0.1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_every_measure_is_that_of_the_dense_deltas(
    ranks: list[int], coefficient: float, dtype: torch.dtype, seed: int
) -> None:
    merged, *updates = random_updates(17, 13, [2, *ranks], seed, scalings=[0.5] * (len(ranks) + 1), dtype=dtype)
    coefficients = [coefficient] * len(updates)
    found = compare(merged, updates, coefficients, generator())
    digits = 1e-4 if dtype == torch.float32 else 1e-9
    size = float(densify(merged).norm()) * max(float(densify(u).norm()) for u in updates)
    assert found.norm == pytest.approx(float(densify(merged).norm()), rel=digits)
    assert found.norms == pytest.approx([float(densify(u).norm()) for u in updates], rel=digits)
    products = [float((densify(merged) * densify(u)).sum()) for u in updates]
    assert found.overlaps == pytest.approx(products, rel=digits, abs=digits * size)
    assert found.relative_error == pytest.approx(dense_error(merged, updates, coefficients), rel=digits)
    assert not found.is_estimate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_an_exact_sum_is_at_the_level_of_rounding(dtype: torch.dtype) -> None:
    updates = random_updates(60, 50, [4, 4, 4], dtype=dtype)
    found = compare(concatenate(updates, [1.0, 0.5, 2.0]), updates, [1.0, 0.5, 2.0], generator())
    assert found.relative_error is not None
    assert found.relative_error < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-1])
def test_a_small_error_keeps_three_digits_in_float32(noise: float) -> None:
    updates = random_updates(600, 500, [16] * 4)
    total = concatenate(updates, [1.0] * 4)
    merged = LowRankUpdate(total.b + noise * random_update(600, 500, 64, 9).b, total.a)
    exact = [LowRankUpdate(u.b.double(), u.a.double(), u.scaling) for u in [merged, *updates]]
    found = compare(merged, updates, [1.0] * 4, generator())
    assert found.relative_error == pytest.approx(dense_error(exact[0], exact[1:], [1.0] * 4), rel=1e-3)


@pytest.mark.parametrize("limit", [0, 256])
def test_a_sum_that_cancels_has_no_relative_error(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_module, "EXACT_JOINT_RANK", limit)
    update = random_update(30, 20, 4)
    assert compare(update, [update, update], [1.0, -1.0], generator()).relative_error is None


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4, 1e-5])
def test_inputs_that_nearly_cancel_are_measured_to_three_digits(difference: float) -> None:
    first, noise = random_updates(200, 150, [8, 8])
    second = LowRankUpdate(first.b + difference * noise.b, first.a)
    for merged in (concatenate([first, second], [1.0, -1.0]), random_update(200, 150, 4, 7).scaled(difference)):
        found = compare(merged, [first, second], [1.0, -1.0], generator())
        exact = compare(*(as_double(merged), [as_double(first), as_double(second)]), [1.0, -1.0], generator())
        assert found.norm == pytest.approx(exact.norm, rel=1e-3)
        assert found.relative_error == pytest.approx(exact.relative_error, rel=1e-3, abs=1e-6 / difference)


@pytest.mark.parametrize("limit", [0, 256])
@pytest.mark.parametrize("size", [1e-25, 1e19])
def test_very_small_and_very_large_updates_are_measured(
    size: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_module, "EXACT_JOINT_RANK", limit)
    merged, *updates = (LowRankUpdate(u.b * size, u.a) for u in random_updates(30, 20, [2, 2, 2]))
    found = compare(merged, updates, [1.0, 1.0], generator())
    exact = dense_error(as_double(merged), [as_double(u) for u in updates], [1.0, 1.0])
    assert found.norm == pytest.approx(float(densify(as_double(merged)).norm()), rel=1e-4)
    assert found.relative_error == pytest.approx(exact, rel=1e-4 if limit else 0.5)


def as_double(update: LowRankUpdate) -> LowRankUpdate:
    return LowRankUpdate(update.b.double(), update.a.double(), update.scaling)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dense=st.integers(0, 4),
    merged_is_dense=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_dense_and_mixed_updates_are_measured_as_their_factors_are(
    ranks: list[int], dense: int, merged_is_dense: bool, dtype: torch.dtype, seed: int
) -> None:
    merged, *updates = random_updates(17, 13, [2, *ranks], seed, scalings=[0.5] * (len(ranks) + 1), dtype=dtype)
    coefficients = [0.5 + t for t in range(len(ranks))]
    given = [StreamedUpdate.of(densify(u)) if t < dense else u for t, u in enumerate(updates)]
    found = compare(DenseUpdate(densify(merged)) if merged_is_dense else merged, given, coefficients, generator())
    expected = compare(as_double(merged), [as_double(u) for u in updates], coefficients, generator())
    digits = 1e-4 if dtype == torch.float32 else 1e-9
    assert found.norm == pytest.approx(expected.norm, rel=digits)
    assert found.norms == pytest.approx(expected.norms, rel=digits)
    size = expected.norm * max(expected.norms)
    assert found.overlaps == pytest.approx(expected.overlaps, rel=digits, abs=digits * size)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=digits)
    assert not found.is_estimate


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_a_small_error_of_a_dense_result_keeps_its_digits(noise: float) -> None:
    first, second, lost = (torch.randn(60, 50, generator=torch.Generator().manual_seed(t)) for t in range(3))
    total = first.double() - 2 * second.double()
    merged = DenseUpdate((total + noise * lost).float())
    found = compare(merged, [StreamedUpdate.of(first), StreamedUpdate.of(second)], [1.0, -2.0], generator())
    assert found.relative_error == pytest.approx(float((merged.delta - total).norm() / total.norm()), rel=1e-6)


def test_the_exact_sum_of_dense_updates_has_no_error_and_a_cancelled_one_no_relative_error() -> None:
    update = StreamedUpdate.of(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
    merged = DenseUpdate(densify(update) * 2)
    assert compare(merged, [update, update], [1.0, 1.0], generator()).relative_error == 0.0
    assert compare(merged, [update, update], [1.0, -1.0], generator()).relative_error is None
    zero = StreamedUpdate.of(torch.zeros(30, 20))
    assert compare(merged, [zero], [1.0], generator()).relative_error is None


def test_dense_updates_are_compared_in_one_pass() -> None:
    delta = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    read: list[int] = []

    def rows(where: slice) -> torch.Tensor:
        read.extend(range(where.start, where.stop))
        return delta[where].clone()

    update = StreamedUpdate((3000, 2000), delta.dtype, delta.device, rows)
    found = held(lambda: compare(DenseUpdate(delta), [update, update], [1.0, 1.0], generator()))
    assert read == [i for start in range(0, 3000, 87) for _ in range(2) for i in range(start, min(start + 87, 3000))]
    assert found.peak_bytes < delta.nbytes


def test_above_the_joint_rank_limit_the_error_is_measured_on_random_inputs() -> None:
    updates = random_updates(400, 300, [16] * 17)
    merged = concatenate(updates[:8], [1.0] * 8)
    found = compare(merged, updates, [1.0] * 17, generator())
    assert found.is_estimate
    assert found.relative_error == pytest.approx(dense_error(merged, updates, [1.0] * 17), rel=0.05)
    assert found == compare(merged, updates, [1.0] * 17, generator())
    assert found.norms == pytest.approx([float(densify(u).norm()) for u in updates], rel=1e-4)
