"""Products of small matrices as factors, against the dense formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.lowrank.structured import full_matrix, hadamard, kronecker, tucker, with_diagonals

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**16)
SCALINGS = st.floats(-3, 3)


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def low_rank(seed: int, d_out: int, d_in: int, rank: int, scaling: float = 1.0) -> LowRankUpdate:
    b, a = randoms(seed, (d_out, rank), (rank, d_in))
    return LowRankUpdate(b, a, scaling)


def test_a_full_matrix_has_an_identity_on_its_smaller_side() -> None:
    wide = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(full_matrix(wide).b, torch.eye(2))
    assert torch.equal(full_matrix(wide).a, wide)
    assert torch.equal(full_matrix(wide.T).b, wide.T)
    assert torch.equal(full_matrix(wide.T).a, torch.eye(2))


def test_the_entry_wise_product_of_two_rank_one_matrices_is_of_rank_one() -> None:
    one = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]), 2.0)
    other = LowRankUpdate(torch.tensor([[10.0], [1.0]]), torch.tensor([[1.0, 0.0, 1.0]]), 0.5)
    product = hadamard(one, other)
    assert (product.b.tolist(), product.a.tolist(), product.scaling) == ([[10.0], [2.0]], [[3.0, 0.0, 5.0]], 1.0)


@given(SEEDS, SIZES, SIZES, SIZES, SIZES, SCALINGS)
def test_hadamard_is_the_product_of_the_deltas(
    seed: int, d_out: int, d_in: int, r1: int, r2: int, scaling: float
) -> None:
    one, other = low_rank(seed, d_out, d_in, r1, scaling), low_rank(seed + 1, d_out, d_in, r2)
    product = hadamard(one, other)
    torch.testing.assert_close(densify(product), densify(one) * densify(other), rtol=1e-12, atol=1e-12)
    assert product.rank == min(r1 * r2, d_out, d_in)


@given(SEEDS, *[SIZES] * 6, st.booleans(), st.booleans(), SCALINGS)
def test_kronecker_is_that_of_the_deltas(
    seed: int, m1: int, n1: int, m2: int, n2: int, r1: int, r2: int, left_full: bool, right_full: bool, scaling: float
) -> None:
    one, other = low_rank(seed, m1, n1, r1, scaling), low_rank(seed + 1, m2, n2, r2, -2.0)
    left = densify(one) if left_full else one
    right = densify(other) if right_full else other
    product = kronecker(left, right)
    torch.testing.assert_close(densify(product), torch.kron(densify(one), densify(other)), rtol=1e-12, atol=1e-12)
    ranks = [
        min(m, n) if full else min(m, n, r) for m, n, r, full in ((m1, n1, r1, left_full), (m2, n2, r2, right_full))
    ]
    assert product.rank == ranks[0] * ranks[1]


@given(SEEDS, SIZES, SIZES, SIZES, SIZES, st.lists(SIZES, max_size=3))
def test_a_tucker_kernel_is_of_the_rank_of_its_output_mode(
    seed: int, d_out: int, channels: int, r_out: int, r_in: int, kernel: list[int]
) -> None:
    core, out, into = randoms(seed, (r_out, r_in, *kernel), (r_out, d_out), (r_in, channels))
    update = tucker(core, out, into)
    dense = torch.einsum("ij...,io,jc->oc...", core, out, into).reshape(d_out, -1)
    torch.testing.assert_close(densify(update), dense, rtol=1e-12, atol=1e-12)
    assert update.rank == r_out


@given(SEEDS, SIZES, SIZES, SIZES, st.booleans(), SCALINGS)
def test_diagonals_are_between_and_before_the_factors(
    seed: int, d_out: int, d_in: int, rank: int, has_rows: bool, scaling: float
) -> None:
    update = low_rank(seed, d_out, d_in, rank, scaling)
    middle, rows = randoms(seed + 1, (rank,), (d_out,))
    left = torch.diag(rows) if has_rows else torch.eye(d_out, dtype=torch.float64)
    dense = scaling * left @ update.b @ torch.diag(middle) @ update.a
    torch.testing.assert_close(
        densify(with_diagonals(update, middle, rows if has_rows else None)), dense, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_keep_their_type(dtype: torch.dtype) -> None:
    update = low_rank(0, 3, 4, 2).to("cpu", dtype)
    matrix = torch.ones(2, 2, dtype=dtype)
    results = (hadamard(update, update), kronecker(matrix, update), with_diagonals(update, torch.ones(2, dtype=dtype)))
    assert {tensor.dtype for result in results for tensor in (result.b, result.a)} == {dtype}


def test_transposed_and_strided_factors_are_taken_as_they_are() -> None:
    one, other = low_rank(0, 4, 3, 2).transposed(), low_rank(1, 6, 8, 1)
    strided = LowRankUpdate(other.b[::2], other.a[:, ::2])
    torch.testing.assert_close(densify(hadamard(one, strided)), densify(one) * densify(strided))
    torch.testing.assert_close(densify(kronecker(one, strided)), torch.kron(densify(one), densify(strided)))
