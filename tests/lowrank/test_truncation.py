from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import (
    DenseUpdate,
    LowRankUpdate,
    Spectrum,
    StreamedUpdate,
    canonical,
    concatenate,
    densify,
    distance,
    factorise,
    norm,
    scratch_space,
    singular_values,
    spectrum_of,
)
from mergekit_lowrank.lowrank import truncation as truncation_module
from mergekit_lowrank.lowrank.truncation import EXACT_SIDE
from mergekit_lowrank.strategies import keyed_generator
from mergekit_lowrank.testing import random_update, random_updates
from mergekit_lowrank.testing.memory import held

SHAPES = {
    "wide": (7, 20, [2, 3]),
    "tall": (20, 7, [2, 3]),
    "rank one": (6, 5, [1]),
    "joint rank above a side": (5, 20, [4, 4]),
    "joint rank above both sides": (5, 4, [4, 4, 4]),
    "one by one": (1, 1, [3]),
}


def stack(d_out: int, d_in: int, ranks: list[int], seed: int = 0) -> LowRankUpdate:
    return concatenate(random_updates(d_out, d_in, ranks, seed, dtype=torch.float64), [0.7] * len(ranks))


def generator() -> torch.Generator:
    return keyed_generator("test")


def test_the_singular_values_of_a_hand_made_update_are_found() -> None:
    update = LowRankUpdate(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    assert spectrum_of(update).values.tolist() == pytest.approx([6.0, 1.0])
    assert spectrum_of(update).energy == pytest.approx(37.0)


def test_a_cut_holds_values_times_left_vectors_in_b_and_right_vectors_in_a() -> None:
    update = LowRankUpdate(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    cut = factorise(update, 1, generator()).cut(1)
    torch.testing.assert_close(cut.b, torch.tensor([[6.0], [0.0]]))
    torch.testing.assert_close(cut.a, torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_factorise_finds_the_singular_values_of_the_dense_delta(shape: tuple[int, int, list[int]], dense: bool) -> None:
    update = stack(*shape)
    expected = torch.linalg.svdvals(densify(update))
    truncation = factorise(DenseUpdate(densify(update)) if dense else update, 2, generator())
    found = truncation.spectrum.values
    common = min(found.numel(), expected.numel())
    torch.testing.assert_close(found[:common], expected[:common], rtol=1e-10, atol=1e-12)
    assert float(expected[common:].sum()) < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    keep=st.integers(1, 14),
)
def test_a_cut_is_the_best_approximation_of_its_rank(
    d_out: int, d_in: int, ranks: list[int], seed: int, keep: int
) -> None:
    update = stack(d_out, d_in, ranks, seed)
    delta = densify(update)
    cut = factorise(update, keep, generator()).cut(keep)
    best = float(torch.linalg.svdvals(delta)[keep:].square().sum().sqrt())
    assert float((densify(cut) - delta).norm()) == pytest.approx(best, rel=1e-9, abs=1e-11)


def test_the_same_adapter_twice_leaves_a_rank_deficient_stack_that_is_still_cut_exactly() -> None:
    update = random_update(9, 8, 3, dtype=torch.float64)
    doubled = concatenate([update, update], [0.5, 0.5])
    truncation = factorise(doubled, 3, generator())
    assert float(truncation.spectrum.values[3:].max()) < 1e-12
    torch.testing.assert_close(densify(truncation.cut(3)), densify(update), rtol=1e-11, atol=1e-12)


def test_opposed_adapters_cancel_to_a_zero_update_without_nan() -> None:
    update = random_update(9, 8, 3, dtype=torch.float64)
    truncation = factorise(concatenate([update, update], [1.0, -1.0]), 3, generator())
    assert float(densify(truncation.cut(3)).abs().max()) < 1e-13


@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_a_zero_update_factorises_to_zeros(dense: bool) -> None:
    zero = LowRankUpdate(torch.zeros(5, 2), torch.zeros(2, 4))
    truncation = factorise(DenseUpdate(densify(zero)) if dense else zero, 2, generator())
    assert truncation.spectrum.energy == 0.0
    assert torch.equal(densify(truncation.cut(2)), torch.zeros(5, 4))


def test_an_update_of_rank_zero_factorises_to_rank_zero() -> None:
    empty = LowRankUpdate(torch.zeros(5, 0), torch.zeros(0, 4))
    truncation = factorise(empty, 2, generator())
    assert truncation.cut(2).rank == 0
    assert spectrum_of(empty).energy == 0.0


def test_a_cut_above_the_existing_rank_gives_what_there_is() -> None:
    assert factorise(random_update(5, 4, 2), 9, generator()).cut(9).rank == 2


@pytest.mark.parametrize("dense", [False, True], ids=["low-rank", "dense"])
def test_the_largest_entry_of_every_left_vector_is_positive(dense: bool) -> None:
    update = random_update(9, 7, 4, seed=3)
    truncation = factorise(DenseUpdate(densify(update)) if dense else update, 4, generator())
    left, _ = truncation.vectors(4)
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    assert bool((peaks > 0).all())


def test_factorise_keeps_the_type_of_the_factors_and_reports_values_in_float64() -> None:
    truncation = factorise(random_update(5, 4, 2), 2, generator())
    assert truncation.cut(2).b.dtype == torch.float32
    assert truncation.spectrum.values.dtype == torch.float64


def test_factorise_takes_views_that_are_not_contiguous() -> None:
    update = random_update(7, 9, 2, dtype=torch.float64).transposed()
    assert not update.b.is_contiguous()
    torch.testing.assert_close(densify(factorise(update, 2, generator()).cut(2)), densify(update))


@cache
def decaying(d_out: int, d_in: int, power: float) -> DenseUpdate:
    """Singular values 1, 2^-power, 3^-power, … to 120 of them, under noise a thousand times smaller."""
    source = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(d_out, 120, generator=source))
    v, _ = torch.linalg.qr(torch.randn(d_in, 120, generator=source))
    noise = torch.randn(d_out, d_in, generator=source) * (1e-3 / math.sqrt(d_in))
    return DenseUpdate((u * leading(120, power)) @ v.T + noise)


def leading(count: int, power: float) -> torch.Tensor:
    return torch.arange(1.0, count + 1).pow(-power)


@pytest.mark.parametrize("shape", [(1000, 900), (900, 1000)], ids=["tall", "wide"])
@pytest.mark.parametrize("power", [0.3, 1.0])
def test_the_randomised_path_captures_the_optimal_energy_within_a_thousandth(
    shape: tuple[int, int], power: float
) -> None:
    update = decaying(*shape, power)
    assert min(update.shape) > EXACT_SIDE
    truncation = factorise(update, 16, generator())
    best = float(leading(16, power).square().sum())
    assert not truncation.spectrum.complete
    # The noise adds a millionth to the optimum itself.
    assert 0.999 * best <= norm(truncation.cut(16)) ** 2 <= 1.0001 * best


def test_the_randomised_path_states_the_energy_that_it_kept() -> None:
    update = decaying(1000, 900, 1.0)
    truncation = factorise(update, 16, generator())
    lost = float((update.delta - densify(truncation.cut(16))).double().square().sum())
    assert 1 - truncation.spectrum.kept(16) == pytest.approx(lost / norm(update) ** 2, rel=1e-3)


def test_the_randomised_path_is_the_same_for_the_same_generator() -> None:
    update = decaying(800, 790, 1.0)
    first, second = (factorise(update, 8, keyed_generator(0, "module")).cut(8) for _ in range(2))
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.a, second.a)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=["tall", "wide"])
def test_the_randomised_path_finds_all_where_its_space_is_the_whole_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation_module, "EXACT_SIDE", 4)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    truncation = factorise(DenseUpdate(delta), 30, generator())
    assert truncation.spectrum.complete
    torch.testing.assert_close(densify(truncation.cut(40)), delta)
    torch.testing.assert_close(truncation.spectrum.values.float(), torch.linalg.svdvals(delta))


@pytest.mark.parametrize("shape", [(1000, 900), (900, 1000)], ids=["tall", "wide"])
def test_the_randomised_path_fixes_signs_by_the_left_vectors(shape: tuple[int, int]) -> None:
    left, right = factorise(decaying(*shape, 1.0), 16, generator()).vectors(16)
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    assert bool((peaks > 0).all())
    torch.testing.assert_close(left.T @ left, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(right @ right.T, torch.eye(16), rtol=0, atol=1e-5)


def test_the_randomised_path_takes_a_zero_delta() -> None:
    truncation = factorise(DenseUpdate(torch.zeros(800, 790)), 4, generator())
    assert torch.equal(densify(truncation.cut(4)), torch.zeros(800, 790))


def test_a_dense_update_is_decomposed_exactly_where_the_rank_asked_for_is_the_whole_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truncation_module, "EXACT_SIDE", 4)
    assert factorise(DenseUpdate(torch.eye(40)), 40, generator()).spectrum.complete
    assert not factorise(DenseUpdate(torch.eye(40)), 3, generator()).spectrum.complete


def spectrum(*values: float, energy: float | None = None, complete: bool = True) -> Spectrum:
    tensor = torch.tensor(values, dtype=torch.float64)
    return Spectrum(tensor, float(tensor.square().sum()) if energy is None else energy, complete)


def test_kept_is_the_share_of_the_squares_of_the_leading_values() -> None:
    assert spectrum(2.0, 1.0, 1.0).kept(1) == pytest.approx(4 / 6)
    assert spectrum(2.0, 1.0, 1.0).kept(2) == pytest.approx(5 / 6)


def test_kept_is_exactly_one_where_nothing_was_cut() -> None:
    assert spectrum(2.0, 1.0).kept(2) == 1.0
    assert spectrum(2.0, 1.0).kept(99) == 1.0


def test_kept_of_a_zero_update_is_one() -> None:
    assert spectrum(0.0, 0.0).kept(0) == 1.0


def test_kept_of_an_incomplete_spectrum_stays_below_one() -> None:
    assert spectrum(2.0, energy=8.0, complete=False).kept(9) == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (4 / 6, 1), (0.67, 2), (5 / 6, 2), (0.9, 3), (1.0, 3)])
def test_rank_for_is_the_least_rank_that_keeps_the_share(share: float, rank: int) -> None:
    assert spectrum(2.0, 1.0, 1.0).rank_for(share) == rank


def test_rank_for_ignores_directions_of_rounding_size_even_at_a_share_of_one() -> None:
    assert spectrum(1.0, 0.5, 1e-9).rank_for(1.0) == 2


def test_rank_for_is_zero_for_a_zero_update() -> None:
    assert spectrum(0.0).rank_for(0.99) == 0


def test_rank_for_is_unknown_where_an_incomplete_spectrum_does_not_reach_the_share() -> None:
    assert spectrum(2.0, energy=8.0, complete=False).rank_for(0.6) is None
    assert spectrum(2.0, energy=8.0, complete=False).rank_for(0.5) == 1


@pytest.mark.parametrize(
    ("error", "rank"), [(0.999, 1), (0.6, 1), (0.59, 2), (0.2, 2), (0.19, 3), (1e-8, 3), (1e-300, 3)]
)
def test_rank_within_is_the_least_rank_whose_error_is_no_larger_even_exactly(error: float, rank: int) -> None:
    # The squares are 16, 8 and 1 of 25: cuts at 1, 2 and 3 leave 9/25, 1/25 and nothing.
    assert spectrum(4.0, 8**0.5, 1.0).rank_within(error) == rank


@pytest.mark.parametrize(("error", "rank"), [(1e-2, 1), (1e-5, 2), (1e-8, 3), (1e-11, 4)])
def test_rank_within_resolves_errors_far_below_the_rounding_of_an_energy(error: float, rank: int) -> None:
    assert spectrum(1.0, 1e-3, 1e-6, 1e-9).rank_within(error) == rank


def test_rank_within_asks_for_no_direction_at_the_level_of_rounding() -> None:
    update = random_update(64, 48, 5)
    doubled = spectrum_of(concatenate([update, update], [0.5, 0.5]))
    assert doubled.resolved == 5
    assert doubled.rank_within(1e-30) == 5
    assert doubled.rank_for(1.0) == 5


def test_rank_within_is_zero_for_a_zero_update() -> None:
    assert spectrum(0.0, 0.0).rank_within(0.5) == 0


def test_rank_within_is_unknown_where_a_partial_spectrum_cannot_tell() -> None:
    partial = spectrum(2.0, 1.0, energy=6.0, complete=False)
    assert partial.rank_within(0.5) == 2  # 1 of 6 is left: an error of 0.41
    assert partial.rank_within(0.4) is None
    whole = spectrum(2.0, 1.0, energy=5.0, complete=False)
    assert whole.rank_within(0.5) == 1
    assert whole.rank_within(1e-4) is None  # a difference of energies is not as good as that
    assert whole.rank_for(1 - 1e-9) is None


def test_the_error_of_a_rank_is_the_root_of_the_energy_left_out() -> None:
    found = spectrum(4.0, 8**0.5, 1.0)
    assert [found.error(rank) for rank in range(5)] == pytest.approx([1, 0.6, 0.2, 0, 0])
    assert spectrum(1.0, 1e-10).error(1) == pytest.approx(1e-10)
    assert spectrum(0.0).error(0) == 0.0
    assert spectrum(2.0, energy=8.0, complete=False).error(1) == pytest.approx(0.5**0.5)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 999), error=st.floats(1e-12, 0.999)
)
def test_the_rank_within_an_error_has_it_and_one_less_has_not(ranks: list[int], seed: int, error: float) -> None:
    found = spectrum_of(stack(9, 8, ranks, seed))
    rank = found.rank_within(error)
    assert rank is not None
    assert found.error(rank) <= error * (1 + 1e-9) + 1e-13  # what rounding leaves of a whole update
    assert rank == 1 or found.error(rank - 1) > error


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 999), share=st.floats(0.05, 0.999)
)
def test_the_rank_for_a_share_keeps_it_and_one_less_does_not(ranks: list[int], seed: int, share: float) -> None:
    found = spectrum_of(stack(9, 8, ranks, seed))
    rank = found.rank_for(share)
    assert rank is not None
    assert found.kept(rank) >= share - 1e-9
    assert rank == 1 or found.kept(rank - 1) < share


def test_the_error_of_a_cut_agrees_with_the_energy_it_kept() -> None:
    update = random_update(20, 30, 6, dtype=torch.float64)
    cut = factorise(update, 3, generator()).cut(3)
    lost = distance(cut, [update], [1.0]) ** 2 / norm(update) ** 2
    assert spectrum_of(update).kept(3) == pytest.approx(1 - lost, rel=1e-10)


def gauged(update: LowRankUpdate, seed: int) -> LowRankUpdate:
    """The same update as (b·G, G⁻¹·a), G a random invertible matrix."""
    source = torch.Generator().manual_seed(seed)
    gauge = torch.eye(update.rank, dtype=torch.float64) + 0.3 * torch.randn(
        update.rank, update.rank, generator=source, dtype=torch.float64
    )
    return LowRankUpdate(update.b @ gauge, torch.linalg.solve(gauge, update.a), update.scaling)


def test_a_balanced_cut_splits_the_singular_values_evenly() -> None:
    update = LowRankUpdate(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    cut = factorise(update, 1, generator()).balanced(1)
    torch.testing.assert_close(cut.b, torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(cut.a, torch.tensor([[0.0, 2.0, 0.0]]))


def test_canonical_factors_of_a_hand_made_update() -> None:
    update = LowRankUpdate(torch.tensor([[0.0], [-8.0]]), torch.tensor([[3.0, 4.0, 0.0]]), scaling=0.1)
    found = canonical(update)  # ΔW = 4 · (0, −1) ⊗ (0.6, 0.8, 0), and the sign goes to the right
    torch.testing.assert_close(found.b, torch.tensor([[0.0], [2.0]]))
    torch.testing.assert_close(found.a, torch.tensor([[-1.2, -1.6, 0.0]]))
    assert found.scaling == 1.0


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 11),
    scaling=st.sampled_from([0.5, 2.0, -1.0]),
    seed=st.integers(0, 999),
)
def test_canonical_keeps_update_and_rank_and_balances_the_factors(
    d_out: int, d_in: int, rank: int, scaling: float, seed: int
) -> None:
    update = random_update(d_out, d_in, rank, seed, scaling=scaling, dtype=torch.float64)
    found = canonical(update)
    assert found.rank == rank
    torch.testing.assert_close(densify(found), densify(update), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.b.T @ found.b, found.a @ found.a.T, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 5), seed=st.integers(0, 999))
def test_canonical_factors_do_not_depend_on_the_gauge(rank: int, seed: int) -> None:
    update = random_update(9, 8, rank, seed, scaling=0.5, dtype=torch.float64)
    first, second = canonical(update), canonical(gauged(update, seed))
    torch.testing.assert_close(second.b, first.b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(second.a, first.a, rtol=1e-6, atol=1e-8)


def test_canonical_factors_of_a_rank_deficient_update_end_in_zeros() -> None:
    update = random_update(9, 8, 2)
    doubled = canonical(LowRankUpdate(torch.cat([update.b, update.b], dim=1), torch.cat([update.a, update.a])))
    assert doubled.rank == 4
    assert torch.count_nonzero(doubled.b[:, 2:]) == 0
    assert torch.count_nonzero(doubled.a[2:]) == 0


def test_canonical_takes_a_zero_update_and_one_of_rank_zero() -> None:
    zero = canonical(LowRankUpdate(torch.zeros(5, 2), torch.randn(2, 4)))
    assert torch.count_nonzero(zero.b) == torch.count_nonzero(zero.a) == 0
    assert canonical(LowRankUpdate(torch.zeros(5, 0), torch.zeros(0, 4))).rank == 0


@pytest.mark.parametrize("size", [1e-25, 1e18])
def test_a_large_dense_update_of_any_magnitude_is_compressed(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation_module, "EXACT_SIDE", 4)
    delta = densify(random_update(60, 50, 3))
    found = factorise(DenseUpdate(delta * size), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(densify(found.cut(3)) / size, delta, rtol=1e-3, atol=1e-3)
    assert found.spectrum.kept(3) == pytest.approx(1, abs=1e-5)
    assert found.spectrum.energy == pytest.approx(float(delta.double().square().sum()) * size * size, rel=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_a_large_dense_update_is_factorised_in_memory_of_its_sides_only(size: float, tmp_path: Path) -> None:
    factors = random_update(1000, 2500, 20)
    with scratch_space(tmp_path, 0):
        update = DenseUpdate(factors.b @ factors.a).scaled(size)
        factorise(update, 4, generator()).cut(4)  # caches
        found = held(lambda: factorise(update, 4, generator()).cut(4))
    memory = factorise(DenseUpdate((factors.b @ factors.a) * size), 4, generator()).cut(4)
    cut = factorise(update, 4, generator()).cut(4)
    assert torch.equal(cut.b, memory.b)
    assert torch.equal(cut.a, memory.a)
    assert found.peak_bytes < update.delta.nbytes / 4


@pytest.mark.parametrize("side", [20, EXACT_SIDE + 32])
def test_a_streamed_update_is_factorised_as_the_dense_one(side: int) -> None:
    delta = densify(random_update(side, side + 5, 6))
    streamed, dense = (factorise(u, 4, generator()).cut(4) for u in (StreamedUpdate.of(delta), DenseUpdate(delta)))
    assert torch.equal(streamed.b, dense.b)
    assert torch.equal(streamed.a, dense.a)


class TestSingularValuesOfSeveral:
    def test_they_are_those_of_each(self) -> None:
        source = torch.Generator().manual_seed(0)
        updates = [
            LowRankUpdate(
                torch.randn(9000, rank, generator=source, dtype=torch.float64),
                torch.randn(rank, 40, generator=source, dtype=torch.float64),
                scaling,
            )
            for rank, scaling in ((3, 1.0), (5, -0.5), (1, 2.0))
        ]
        for found, update in zip(singular_values(updates), updates, strict=True):
            torch.testing.assert_close(found, torch.linalg.svdvals(update.b @ update.a * update.scaling)[: update.rank])

    def test_repeated_and_zero_directions(self) -> None:
        b = torch.tensor([[3.0, 3.0, 0.0], [4.0, 4.0, 0.0]])
        a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 7.0]])
        (found,) = singular_values([LowRankUpdate(b, a)])
        assert found.tolist() == pytest.approx([10.0, 0.0, 0.0], abs=1e-6)
