from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import (
    DenseJointDecomposition,
    InputUpdate,
    LowRankUpdate,
    StreamedUpdate,
    dense_joint_decomposition,
    densify,
    joint_decomposition,
    scratch_space,
)
from mergekit_lowrank.lowrank import dense_joint as dense_joint_module
from mergekit_lowrank.testing import random_update

CASES = {
    "wide": (5, 11, 2),
    "tall": (7, 5, 2),
    "taller than all columns": (13, 4, 3),
    "as tall as all columns": (12, 4, 3),
    "one input": (6, 5, 1),
    "one wide input": (5, 6, 1),
    "one row": (1, 5, 2),
    "one column": (5, 1, 2),
}
DIRECTIONS = pytest.mark.parametrize("vertical", [False, True], ids=["horizontal", "vertical"])
SHAPES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def matrices(d_out: int, d_in: int, count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def joint_of(deltas: list[Tensor], tolerance: float = 1e-12, *, vertical: bool = False) -> DenseJointDecomposition:
    return dense_joint_decomposition([StreamedUpdate.of(d) for d in deltas], tolerance, vertical=vertical)


def stacked(deltas: list[Tensor], *, vertical: bool) -> Tensor:
    return torch.cat([d.T if vertical else d for d in deltas], dim=1)


def test_it_is_the_svd_of_hand_made_matrices() -> None:
    joint = joint_of([torch.tensor([[0.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [-2.0, 0.0]])])
    assert torch.equal(joint.left, torch.eye(2))
    assert torch.equal(joint.singular_values, torch.tensor([3.0, 2.0]))
    assert torch.equal(joint.coordinates[0], torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert torch.equal(joint.coordinates[1], torch.tensor([[0.0, 0.0], [-2.0, 0.0]]))
    assert torch.equal(joint.right_norms(), torch.eye(2))


@DIRECTIONS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_equals_the_dense_svd(case: tuple[int, int, int], vertical: bool, dtype: torch.dtype) -> None:
    deltas = matrices(*case, dtype)
    joint = joint_of(deltas, vertical=vertical)
    whole = stacked(deltas, vertical=vertical)
    digits = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    u, s, vh = torch.linalg.svd(whole.double(), full_matrices=False)
    torch.testing.assert_close(joint.singular_values.double(), s, **digits)
    torch.testing.assert_close((joint.left.double().T @ u).abs(), torch.eye(len(s)).double(), **digits)
    coordinates = torch.cat(list(joint.coordinates), dim=1).double()
    torch.testing.assert_close(joint.left.double() @ coordinates, whole.double(), **digits)
    norms = torch.stack([own.norm(dim=1) for own in torch.tensor_split(vh, len(deltas), dim=1)])
    torch.testing.assert_close(joint.right_norms().double(), norms, **digits)
    assert {t.dtype for t in (joint.left, joint.singular_values, joint.coordinates, joint.sizes)} == {dtype}


@DIRECTIONS
@SHAPES
def test_the_largest_entry_of_each_left_vector_is_positive(case: tuple[int, int, int], vertical: bool) -> None:
    left = joint_of(matrices(*case), vertical=vertical).left
    assert bool((left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all())


@DIRECTIONS
@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 8),
    d_in=st.integers(1, 8),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dense=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_mixed_inputs_come_back_from_their_coordinates(
    vertical: bool, d_out: int, d_in: int, ranks: list[int], dense: int, seed: int
) -> None:
    low = [random_update(d_out, d_in, r, seed + t, scaling=0.5, dtype=torch.float64) for t, r in enumerate(ranks)]
    updates: list[InputUpdate] = [StreamedUpdate.of(densify(u)) for u in low[:dense]]
    updates += low[dense:]
    joint = dense_joint_decomposition(updates, 1e-10, vertical=vertical)
    for own, update in zip(joint.coordinates, low, strict=True):
        found = joint.left @ own
        torch.testing.assert_close(found.T if vertical else found, densify(update), rtol=0, atol=1e-7)
    gram = joint.left.T @ joint.left
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-4)


@DIRECTIONS
@pytest.mark.parametrize("tolerance", [1e-5, 0.4])
def test_directions_are_cut_as_those_of_factors_are(vertical: bool, tolerance: float) -> None:
    deltas = matrices(9, 7, 3)
    low = [LowRankUpdate(d, torch.eye(7, dtype=d.dtype)) for d in deltas]
    expected = joint_decomposition([u.transposed() for u in low] if vertical else low, tolerance)
    joint = joint_of(deltas, tolerance, vertical=vertical)
    torch.testing.assert_close(joint.singular_values, expected.singular_values)
    torch.testing.assert_close(joint.left, expected.left)
    torch.testing.assert_close(joint.right_norms(), expected.right_norms())


@DIRECTIONS
@SHAPES
@pytest.mark.parametrize("limit", [1, 20, 10**6])
def test_blocks_do_not_change_values(
    monkeypatch: pytest.MonkeyPatch, case: tuple[int, int, int], vertical: bool, limit: int
) -> None:
    deltas = matrices(*case)
    whole = joint_of(deltas, vertical=vertical)
    monkeypatch.setattr(dense_joint_module, "GRAM_BLOCK_ENTRIES", limit)
    monkeypatch.setattr(dense_joint_module, "TRIANGLE_STEP", 3)
    parts = joint_of(deltas, vertical=vertical)
    torch.testing.assert_close(parts.left, whole.left, rtol=0, atol=1e-11)
    torch.testing.assert_close(parts.coordinates, whole.coordinates, rtol=0, atol=1e-11)


@DIRECTIONS
@SHAPES
def test_in_scratch_space_it_has_the_same_bits(case: tuple[int, int, int], vertical: bool, tmp_path: Path) -> None:
    deltas = matrices(*case, torch.float32)
    before = [d.clone() for d in deltas]
    memory = joint_of(deltas, vertical=vertical)
    with scratch_space(tmp_path, 0):
        disk = joint_of(deltas, vertical=vertical)
    assert torch.equal(memory.left, disk.left)
    assert torch.equal(memory.coordinates, disk.coordinates)
    assert all(torch.equal(d, b) for d, b in zip(deltas, before, strict=True))


@DIRECTIONS
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (90, 20)])
def test_a_zero_update_has_no_part_in_any_direction(shape: tuple[int, int], place: int, vertical: bool) -> None:
    deltas = matrices(*shape, 2, torch.float32)
    deltas.insert(place, torch.zeros(shape))
    joint = joint_of(deltas, 1e-5, vertical=vertical)
    assert not joint.coordinates[place].any()
    assert not joint.right_norms()[place].any()
    assert all(joint.coordinates[t].any() for t in range(3) if t != place)


@DIRECTIONS
def test_zero_updates_have_no_directions(vertical: bool) -> None:
    for shape in ((4, 5), (12, 3)):
        joint = joint_of([torch.zeros(shape)] * 2, 1e-5, vertical=vertical)
        assert (joint.left.shape[1], joint.coordinates.shape[1], len(joint.singular_values)) == (0, 0, 0)


@DIRECTIONS
@pytest.mark.parametrize("tolerance", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (200, 30)])
def test_an_update_of_low_rank_given_twice_has_no_directions_of_rounding(
    shape: tuple[int, int], tolerance: float, vertical: bool
) -> None:
    delta = densify(random_update(*shape, 5, dtype=torch.float64))
    joint = joint_of([delta, delta.clone()], tolerance, vertical=vertical)
    assert joint.left.shape[1] == 5
    torch.testing.assert_close(joint.coordinates[0], joint.coordinates[1], rtol=0, atol=1e-10)


def test_a_direction_that_one_update_alone_uses_is_zero_in_the_others() -> None:
    (first, second), (turn,) = matrices(40, 50, 2), matrices(40, 40, 1)
    first[20:], second[:20] = 0, 0
    q, _ = torch.linalg.qr(turn)
    joint = joint_of([q @ first, q @ (0.01 * second)], 1e-8)
    assert torch.equal(joint.sizes.count_nonzero(dim=0), torch.ones(40, dtype=torch.int64))


def test_each_update_is_read_once() -> None:
    delta = matrices(30, 20, 1)[0]
    read: list[int] = []

    def rows(where: slice) -> Tensor:
        read.extend(range(where.start, where.stop))
        return delta[where].clone()

    update = StreamedUpdate((30, 20), delta.dtype, delta.device, rows)
    dense_joint_decomposition([update, StreamedUpdate.of(delta)], 1e-5)
    assert read == list(range(30))
