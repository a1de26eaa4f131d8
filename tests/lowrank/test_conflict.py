"""Opposed signs among the entries of updates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, StreamedUpdate, independent_conflict, sign_conflict
from mergekit_lowrank.lowrank.conflict import EXACT_ENTRIES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_update(seed: int, shape: tuple[int, int] = (40, 30), rank: int = 4) -> LowRankUpdate:
    source = generator(seed)
    b, a = (torch.randn(*size, generator=source, dtype=torch.float64) for size in ((shape[0], rank), (rank, shape[1])))
    return LowRankUpdate(b, a, 0.5)


def rank_one(column: list[float], row: list[float]) -> LowRankUpdate:
    return LowRankUpdate(torch.tensor([column]).T.double(), torch.tensor([row]).double())


def dense(update: LowRankUpdate) -> Tensor:
    return update.b @ update.a * update.scaling


def test_by_hand() -> None:
    x, y = rank_one([1, 1], [1, -2]), rank_one([1, 0], [3, 1])  # [[1, -2], [1, -2]] and [[3, 1], [0, 0]]
    found = sign_conflict([x, y], [1.0, 0.5], generator())
    assert found.pairs.tolist() == [[0.0, 0.5], [0.5, 0.0]]  # of two entries in which both are not zero, one differs
    assert found.opposed == pytest.approx(0.5 / 8.0)  # |w ΔW|: 1 + 2 + 1 + 2 and 1.5 + 0.5; 0.5 stands against -2
    assert (found.standard_error, found.pair_error, found.is_exact) == (0.0, 0.0, True)


@pytest.mark.parametrize("shape", [(40, 30), (300, 200)], ids=["exact", "sampled"])
def test_an_update_beside_itself_and_its_negative(shape: tuple[int, int]) -> None:
    x = random_update(1, shape)
    same, negative = LowRankUpdate(x.b, x.a, 3.0), LowRankUpdate(-x.b, x.a, x.scaling)
    assert sign_conflict([x, same], [1, 1], generator()).opposed == 0
    found = sign_conflict([x, negative], [1, 1], generator())
    assert found.opposed == pytest.approx(0.5)
    assert found.pairs.tolist() == [[0, 1], [1, 0]]
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_zero_updates_have_no_signs() -> None:
    x, zero = random_update(1), rank_one([0] * 40, [0] * 30)
    found = sign_conflict([x, zero], [1, 1], generator())
    assert found.opposed == 0
    assert math.isnan(found.pairs[0, 1])
    assert sign_conflict([zero], [1], generator()).opposed is None
    assert sign_conflict([x], [0.0], generator()).opposed is None


def test_updates_of_disjoint_rows_never_meet() -> None:
    found = sign_conflict([rank_one([1, 0], [1, -1]), rank_one([0, 1], [1, 1])], [1, 1], generator())
    assert found.opposed == 0
    assert math.isnan(found.pairs[0, 1])


@pytest.mark.parametrize("kind", [DenseUpdate, StreamedUpdate.of], ids=["dense", "streamed"])
@pytest.mark.parametrize("shape", [(40, 30), (300, 200)], ids=["exact", "sampled"])
def test_dense_updates_give_what_their_factors_give(kind: type[DenseUpdate], shape: tuple[int, int]) -> None:
    """A dense one among them decides which entries are looked at."""
    updates = [random_update(seed, shape) for seed in range(3)]
    found = [
        sign_conflict([kind(dense(u)) if t in which else u for t, u in enumerate(updates)], [1, -2, 0.5], generator())
        for which in ({0}, {0, 1, 2})
    ]
    assert found[0].opposed == pytest.approx(found[1].opposed)
    assert torch.equal(found[0].pairs, found[1].pairs)
    wanted = sign_conflict(updates, [1, -2, 0.5], generator())
    assert found[0].opposed == pytest.approx(
        wanted.opposed, abs=1e-9 + 4 * (wanted.standard_error + found[0].standard_error)
    )


def test_a_sample_is_within_its_error() -> None:
    """Of 60 samples about 95 % must lie within two standard errors; fewer than 80 % would be no accident."""
    updates = [random_update(seed, (400, 300)) for seed in range(3)]
    entries = torch.stack([dense(u) for u in updates])
    mass, total = entries.abs().sum(dim=0), entries.sum(dim=0).abs()
    opposed = float((mass - total).sum() / 2 / mass.sum())
    pair = float((entries[0].sign() != entries[1].sign()).double().mean())
    samples = [sign_conflict(updates, [1, 1, 1], generator(seed)) for seed in range(60)]
    assert not any(s.is_exact for s in samples)
    assert all(0 < s.standard_error < 0.02 for s in samples)
    assert sum(abs(s.opposed - opposed) <= 2 * s.standard_error for s in samples if s.opposed is not None) >= 48
    assert sum(abs(float(s.pairs[0, 1]) - pair) <= 2 * s.pair_error for s in samples) >= 48


def test_the_same_generator_gives_the_same_sample() -> None:
    updates = [random_update(seed, (300, 200)) for seed in range(2)]
    first, again, other = (sign_conflict(updates, [1, 1], generator(seed)) for seed in (0, 0, 1))
    assert first.opposed == again.opposed != other.opposed


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_one_factor_for_all_weights_changes_nothing(seed: int, factor: float, rows: int, columns: int) -> None:
    updates = [random_update(seed + n, (rows, columns), 2) for n in range(3)]
    found = sign_conflict(updates, [1.0, 2.0, 3.0], generator())
    scaled = sign_conflict(updates, [factor, 2 * factor, 3 * factor], generator())
    assert found.opposed is not None
    assert 0 <= found.opposed <= 0.5
    assert scaled.opposed == pytest.approx(found.opposed, abs=1e-9)
    assert torch.equal(found.pairs, found.pairs.T)


def test_the_bound_between_whole_and_sampled_modules() -> None:
    side = int(EXACT_ENTRIES**0.5)
    updates = [random_update(seed, (side, side)) for seed in range(2)]
    wider = [random_update(seed, (side, side + 1)) for seed in range(2)]
    assert sign_conflict(updates, [1, 1], generator()).is_exact
    assert not sign_conflict(wider, [1, 1], generator()).is_exact


def test_what_independent_updates_have() -> None:
    source = generator(3)
    updates = [DenseUpdate(torch.randn(100, 120, generator=source) * size) for size in (1.0, 2.0, 0.5)]
    found = sign_conflict(updates, [1, 1, 1], generator())
    wanted = independent_conflict([float(torch.linalg.matrix_norm(u.delta)) for u in updates])
    assert found.is_exact
    assert found.opposed == pytest.approx(wanted, abs=0.01)
    assert independent_conflict([1.0, 0.0]) == 0
    assert independent_conflict([0.0, 0.0]) is independent_conflict([1.0]) is None
