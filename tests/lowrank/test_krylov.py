"""The Krylov space holds nearly all that the best one of its rank holds, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.lowrank import krylov
from mergekit_lowrank.lowrank.krylov import frobenius_energy, krylov_space

SIDES = (300, 390)
INDEX = torch.arange(1.0, SIDES[0] + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones_like(INDEX),
    "nearly flat": 1 - 0.3 * INDEX / SIDES[0],
    "slow": INDEX.pow(-0.3),
    "steep": 0.8**INDEX,
    "pairs": ((INDEX + 1) // 2).pow(-0.2),
    "cliff behind the rank": torch.where(INDEX <= 16, 1.0, 0.5),
    "cliff far behind the rank": torch.where(INDEX <= 90, 1.0, 0.1),
    "one giant": torch.where(INDEX <= 1, 1e5, INDEX.pow(-0.2)),
    "rank five": torch.where(INDEX <= 5, 1.0, 0.0),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(random(SIDES[0], len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(random(SIDES[1], len(values), seed=1, dtype=torch.float64))
    return ((left * values) @ right.T).float()


def trimmed() -> Tensor:
    """Products of rank 16, their small entries gone: a flat head over noise, as TIES leaves it."""
    total = torch.zeros(SIDES)
    for seed in range(4):
        delta = random(SIDES[0], 16, seed=seed) @ random(16, SIDES[1], seed=seed + 10)
        total += torch.where(delta.abs() > 5, delta, 0)
    return total


def captured(images: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(images.double())[:rank].square().sum())


def best(matrix: Tensor, rank: int) -> float:
    return captured(matrix, rank)


def space(matrix: Tensor, rank: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    return krylov_space(matrix, rank, torch.Generator().manual_seed(seed))


def assert_orthonormal(basis: Tensor, tolerance: float = 1e-5) -> None:
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_space_captures_the_best_energy_within_a_thousandth(spectrum: Tensor, rank: int, seed: int) -> None:
    matrix = with_spectrum(spectrum)
    basis, images = space(matrix, rank, seed)
    assert_orthonormal(basis)
    assert captured(images, rank) == pytest.approx(best(matrix, rank), rel=1e-3)


@pytest.mark.parametrize("matrix", [random(*SIDES), trimmed()], ids=["noise", "trimmed"])
@pytest.mark.parametrize("seed", range(4))
def test_noise_and_merged_deltas_are_captured_within_a_thousandth(matrix: Tensor, seed: int) -> None:
    basis, images = space(matrix, seed=seed)
    assert basis.shape[1] < SIDES[0]
    assert 0.999 * best(matrix, 16) < captured(images, 16) < 1.000001 * best(matrix, 16)


@pytest.mark.parametrize("side", [63, 64, 65, 130])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_images_are_those_of_the_basis_for_either_layout(side: int, is_transposed: bool) -> None:
    matrix = random(150, side, dtype=torch.float64).T if is_transposed else random(side, 150, dtype=torch.float64)
    basis, images = space(matrix, 4)
    assert_orthonormal(basis, 1e-12)
    torch.testing.assert_close(images, matrix.T @ basis)


def test_the_layout_does_not_matter() -> None:
    matrix = random(200, 150, dtype=torch.float64)
    by_columns = matrix.T.contiguous().T
    for found, expected in zip(space(by_columns, 4), space(matrix, 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_tall_matrix_has_its_space_too() -> None:
    matrix = with_spectrum(SPECTRA["slow"]).T
    _, images = space(matrix)
    assert captured(images, 16) == pytest.approx(best(matrix, 16), rel=1e-3)


def test_the_same_generator_gives_the_same_space() -> None:
    matrix = trimmed()
    for first, second in zip(space(matrix), space(matrix), strict=True):
        assert torch.equal(first, second)


def test_a_steep_spectrum_takes_two_blocks() -> None:
    basis, _ = space(with_spectrum(SPECTRA["steep"]))
    assert 32 < basis.shape[1] <= 64


def test_blocks_are_rounded_up_to_sixteen_columns_and_cut_at_the_side() -> None:
    assert space(torch.eye(100), 17)[0].shape[1] == 48
    assert space(torch.eye(40), 30)[0].shape[1] == 40


def test_a_space_that_reaches_the_side_is_the_whole_one() -> None:
    basis, images = space(random(100, 120, dtype=torch.float64), 20)
    assert basis.shape == (100, 100)
    assert_orthonormal(basis, 1e-12)
    assert captured(images, 20) == pytest.approx(best(random(100, 120, dtype=torch.float64), 20), rel=1e-12)


def test_no_more_blocks_than_allowed_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "MAXIMUM_BLOCKS", 3)
    basis, _ = space(random(*SIDES))
    assert basis.shape[1] == 3 * 32


def test_a_matrix_with_few_rows_that_are_not_zero_is_not_counted_twice() -> None:
    matrix = torch.zeros(SIDES)
    matrix[:32] = random(32, SIDES[1])
    basis, images = space(matrix)
    assert_orthonormal(basis)
    assert captured(images, basis.shape[1]) == pytest.approx(frobenius_energy(matrix), rel=1e-5)


def test_a_zero_matrix_has_an_orthonormal_basis_and_no_images() -> None:
    basis, images = space(torch.zeros(SIDES))
    assert basis.shape[1] >= 16
    assert_orthonormal(basis)
    assert torch.count_nonzero(images) == 0


def test_the_energy_of_a_hand_made_matrix_is_exact() -> None:
    assert frobenius_energy(torch.tensor([[3.0, 0.0], [4.0, 12.0]])) == 169.0


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_energy_is_good_to_a_millionth_in_single_precision(is_transposed: bool) -> None:
    matrix = random(1000, 700).T if is_transposed else random(1000, 700)
    assert frobenius_energy(matrix) == pytest.approx(float(matrix.double().square().sum()), rel=1e-6)
