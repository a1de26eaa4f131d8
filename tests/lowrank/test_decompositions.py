from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import (
    JointDecomposition,
    LowRankUpdate,
    decompositions,
    densify,
    in_double,
    joint_decomposition,
    left_singular_basis,
)
from mergekit_lowrank.lowrank.decompositions import fix_signs, gram, svd, thin_basis, thin_qr
from mergekit_lowrank.testing import random_update, random_updates

CASES = {
    "wide": (5, 11, [2, 2]),
    "tall": (11, 5, [2, 2]),
    "mixed ranks": (9, 8, [1, 4, 2]),
    "joint rank above a side": (4, 11, [3, 3]),
    "joint rank above both sides": (4, 5, [4, 4, 4]),
    "rank above a side": (3, 4, [6, 5]),
    "one input": (6, 5, [2]),
    "rank one": (6, 5, [1, 1]),
}


def right_blocks(joint: JointDecomposition) -> Tensor:
    return torch.bmm(joint.right_cores, joint.right_bases)


def test_thin_qr_of_an_empty_matrix_is_empty() -> None:
    q, r = thin_qr(torch.zeros(5, 0))
    assert (tuple(q.shape), tuple(r.shape)) == ((5, 0), (0, 0))


@settings(deadline=None, max_examples=60)
@given(
    d=st.integers(1, 40),
    n=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scales=st.sampled_from([1.0, 1e-6]),
    repeated=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_thin_basis_is_orthonormal_and_gives_the_matrix_back(
    d: int, n: int, dtype: torch.dtype, scales: float, repeated: bool, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, d) if transposed else (d, n)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    matrix = matrix.T if transposed else matrix
    matrix = matrix * torch.where(torch.arange(n) % 2 == 0, 1.0, scales).to(dtype)  # columns of unlike size
    if repeated and n > 1:
        matrix = torch.cat([matrix, matrix[:, :1]], dim=1)
    basis = thin_basis(matrix)
    q = basis.times(torch.eye(basis.factor.shape[0]))
    digits = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=dtype), rtol=0, atol=digits)
    torch.testing.assert_close(q @ basis.factor.to(dtype), matrix, rtol=0, atol=digits * 10)
    assert q.dtype == dtype


def test_columns_that_are_independent_are_not_decomposed_by_householder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "thin_qr", lambda _: pytest.fail("took a QR"))
    matrix = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    assert not thin_basis(matrix).is_formed


@pytest.mark.parametrize("share", [0.0, 1e-6])
def test_columns_that_nearly_depend_on_others_are_decomposed_by_householder(share: float) -> None:
    matrix = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    matrix[:, 2] = matrix[:, 0] + share * matrix[:, 1]
    assert thin_basis(matrix).is_formed


def test_columns_that_depend_on_all_before_them_together_are_decomposed_by_householder() -> None:
    # Kahan's matrix: no column nearly depends on the others by its diagonal entry, all of them together do.
    n, sine, cosine = 16, 0.57, (1 - 0.57**2) ** 0.5
    rows = torch.triu(torch.full((n, n), -cosine), diagonal=1) + torch.eye(n)
    matrix = (sine ** torch.arange(n)).unsqueeze(1) * rows
    basis = thin_basis(matrix)
    q = basis.times(torch.eye(n)).double()
    assert basis.is_formed
    torch.testing.assert_close(q.T @ q, torch.eye(n).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gram_matrix_adds_up_blocks_of_columns(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(decompositions, "GRAM_COLUMNS", 4)
    found = gram(rows, dtype)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, rows.double() @ rows.double().T, rtol=100 * torch.finfo(dtype).eps, atol=1e-6)


def test_svd_of_an_empty_matrix_is_empty() -> None:
    u, s, vh = svd(torch.zeros(0, 4))
    assert (tuple(u.shape), tuple(s.shape), tuple(vh.shape)) == ((0, 0), (0,), (0, 4))


def test_in_double_gives_float64() -> None:
    assert in_double(torch.zeros(2)).dtype == torch.float64


def test_fix_signs_turns_a_column_whose_largest_entry_is_negative_and_its_partner() -> None:
    left, right = fix_signs(torch.tensor([[1.0, -3.0], [2.0, 1.0]]), torch.tensor([[4.0], [5.0]]))
    assert torch.equal(left, torch.tensor([[1.0, 3.0], [2.0, -1.0]]))
    assert torch.equal(right, torch.tensor([[4.0], [-5.0]]))


def test_fix_signs_looks_at_the_first_of_several_largest_entries() -> None:
    left, _ = fix_signs(torch.tensor([[-2.0], [2.0]]), torch.ones(1, 1))
    assert torch.equal(left, torch.tensor([[2.0], [-2.0]]))


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 6), n=st.integers(1, 4), seed=st.integers(0, 999))
def test_fix_signs_makes_the_first_largest_entry_of_every_column_positive(d: int, n: int, seed: int) -> None:
    # Small integers tie often.
    matrix = torch.randint(-2, 3, (d, n), generator=torch.Generator().manual_seed(seed)).float()
    left, right = fix_signs(matrix, torch.eye(n))
    assert bool((left.gather(0, left.abs().argmax(dim=0, keepdim=True)) >= 0).all())
    assert torch.equal(left @ right, matrix)


def test_fix_signs_leaves_a_zero_column_as_it_is() -> None:
    left, right = fix_signs(torch.zeros(2, 1), torch.ones(1, 3))
    assert torch.equal(left, torch.zeros(2, 1))
    assert torch.equal(right, torch.ones(1, 3))


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 10), n=st.integers(1, 10), seed=st.integers(0, 99))
def test_the_left_singular_basis_is_orthonormal_and_spans_the_columns(d: int, n: int, seed: int) -> None:
    matrix = random_update(d, n, min(d, n), seed, dtype=torch.float64).b
    basis, coordinates = left_singular_basis(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(coordinates, basis.T @ matrix, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(basis @ coordinates, matrix, rtol=1e-10, atol=1e-11)


def test_the_left_singular_basis_leaves_out_directions_of_rounding_size() -> None:
    column = torch.tensor([[1.0], [2.0], [3.0]])
    assert left_singular_basis(torch.cat([column, column], dim=1))[0].shape == (3, 1)
    assert left_singular_basis(torch.zeros(3, 2))[0].shape == (3, 0)


def test_the_left_singular_basis_comes_in_descending_order_with_positive_peaks() -> None:
    basis, _ = left_singular_basis(torch.tensor([[0.0, -2.0], [-1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(basis, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_joint_decomposition_reconstructs_every_update(case: tuple[int, int, list[int]]) -> None:
    d_out, d_in, ranks = case
    updates = random_updates(d_out, d_in, ranks, scalings=[0.5 + t for t in range(len(ranks))], dtype=torch.float64)
    joint = joint_decomposition(updates, 1e-12)
    rebuilt = (joint.left * joint.singular_values) @ right_blocks(joint)
    for update, delta in zip(updates, rebuilt, strict=True):
        torch.testing.assert_close(delta, densify(update), rtol=1e-10, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 8),
    d_in=st.integers(1, 8),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_the_joint_decomposition_has_the_singular_values_of_the_dense_concatenation(
    d_out: int, d_in: int, ranks: list[int], seed: int
) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    found = joint_decomposition(updates, 0.0).singular_values
    dense = torch.linalg.svdvals(torch.cat([densify(u) for u in updates], dim=1))
    common = min(found.numel(), dense.numel())
    torch.testing.assert_close(found[:common], dense[:common], rtol=1e-9, atol=1e-11)
    assert float(dense[common:].sum()) < 1e-10


def test_the_joint_bases_are_orthonormal() -> None:
    joint = joint_decomposition(random_updates(9, 8, [2, 3, 1], dtype=torch.float64), 1e-10)
    count = joint.singular_values.numel()
    identity = torch.eye(count, dtype=torch.float64)
    right = torch.cat(list(right_blocks(joint)), dim=1)
    torch.testing.assert_close(joint.left.T @ joint.left, identity)
    torch.testing.assert_close(right @ right.T, identity)


def test_the_right_norms_are_those_of_the_dense_right_blocks() -> None:
    joint = joint_decomposition(random_updates(9, 8, [2, 3, 1], dtype=torch.float64), 1e-10)
    torch.testing.assert_close(joint.right_norms(), right_blocks(joint).norm(dim=2))


def test_the_largest_entry_of_every_joint_left_vector_is_positive() -> None:
    left = joint_decomposition(random_updates(9, 8, [2, 3], 5), 1e-6).left
    assert bool((left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_joint_directions_below_the_tolerance_are_cut() -> None:
    strong = LowRankUpdate(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    weak = LowRankUpdate(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0.005, 0.0]]))
    assert joint_decomposition([strong, weak], 1e-2).singular_values.tolist() == pytest.approx([1.0])
    assert joint_decomposition([strong, weak], 1e-3).singular_values.numel() == 2


def test_duplicated_updates_share_their_joint_directions() -> None:
    update = random_update(9, 8, 2, dtype=torch.float64)
    joint = joint_decomposition([update, update], 1e-10)
    assert joint.singular_values.numel() == 2
    torch.testing.assert_close(right_blocks(joint)[0], right_blocks(joint)[1])


@pytest.mark.parametrize("zero", ["a", "b"])
def test_the_joint_decomposition_of_zero_updates_is_empty(zero: str) -> None:
    b = torch.zeros(4, 2) if zero == "b" else torch.ones(4, 2)
    a = torch.zeros(2, 5) if zero == "a" else torch.ones(2, 5)
    joint = joint_decomposition([LowRankUpdate(b, a)] * 2, 1e-5)
    assert joint.left.shape == (4, 0)
    assert right_blocks(joint).shape == (2, 0, 5)


def test_updates_of_rank_zero_are_zero_updates_in_the_joint_decomposition() -> None:
    updates = [random_update(6, 5, 2), LowRankUpdate(torch.zeros(6, 0), torch.zeros(0, 5))]
    blocks = right_blocks(joint_decomposition(updates, 1e-5))
    assert blocks.shape == (2, 2, 5)
    assert torch.equal(blocks[1], torch.zeros(2, 5))
