from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.lowrank import scratch_space
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import BLOCK_ENTRIES, DeltaSpace, JointParams, JointSpace, Part, SpaceParams
from mergekit_lowrank.spaces import base as base_module
from mergekit_lowrank.testing import random_updates
from mergekit_lowrank.testing.memory import held


def stacked(rows: int = 10, columns: int = 7, inputs: int = 3) -> Part:
    stack = torch.arange(float(inputs * rows * columns)).view(inputs, rows, columns)
    return Part.stacked("delta", stack, [1.0] * inputs)


def test_a_stacked_part_knows_its_inputs_entries_and_sizes() -> None:
    part = stacked()
    assert (part.inputs, part.entries, part.sizes, part.axis) == (3, 70, (70, 70, 70), 0)


@pytest.mark.parametrize("limit", [1, 21, 50, 10**6])
def test_blocks_cover_every_row_exactly_once_and_in_order(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", limit)
    part = stacked()
    whole = torch.cat(list(part.blocks()), dim=1)
    assert torch.equal(whole, torch.arange(210.0).view(3, 10, 7))


@pytest.mark.parametrize("limit", [1, 21, 50, 10**6])
def test_joint_blocks_cover_every_column_exactly_once_and_in_order(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    part = JointSpace(JointParams()).encode(random_updates(9, 8, [2, 3], dtype=torch.float64), [1.0, 1.0]).parts[0]
    (whole,) = part.blocks()
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", limit)
    torch.testing.assert_close(torch.cat(list(part.blocks()), dim=2), whole, rtol=1e-13, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 50),
    columns=st.integers(0, 50),
    inputs=st.integers(1, 5),
    axis=st.integers(0, 1),
    limit=st.integers(1, 400),
)
def test_slices_partition_the_axis_within_the_limit(
    rows: int, columns: int, inputs: int, axis: int, limit: int
) -> None:
    read = torch.zeros(inputs, rows, columns)
    part = Part("x", (rows, columns), (1.0,) * inputs, (0,) * inputs, axis, read.dtype, read.device, lambda _: read)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base_module, "BLOCK_ENTRIES", limit)
        slices = list(part.slices())
    length, other = part.shape[axis], part.shape[1 - axis]
    assert [i for where in slices for i in range(where.start, where.stop)] == list(range(length))
    assert all(s.stop - s.start == 1 or (s.stop - s.start) * inputs * other <= limit for s in slices)


def test_block_boundaries_depend_on_shapes_only() -> None:
    space = DeltaSpace(SpaceParams())
    boundaries = []
    for seed, dtype, scale in ((0, torch.float32, 1.0), (1, torch.float64, -3.0)):
        updates = random_updates(1500, 900, [2, 2], seed, scalings=[scale, scale], dtype=dtype)
        boundaries.append(list(space.encode(updates, [scale, 1.0]).parts[0].slices()))
    assert len(boundaries[0]) == 6
    assert boundaries[0] == boundaries[1]


def test_a_block_of_all_inputs_stays_within_the_documented_size() -> None:
    part = DeltaSpace(SpaceParams()).encode(random_updates(3000, 700, [1, 1, 1]), [1.0] * 3).parts[0]
    assert max(block.numel() for block in part.blocks()) <= BLOCK_ENTRIES


@pytest.mark.parametrize("limit", [1, 21, 10**6])
def test_merged_applies_a_function_to_every_block_and_puts_the_results_together(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", limit)
    part = stacked()
    merged = part.merged(lambda block: block[0] - 2 * block[2])
    whole = torch.arange(210.0).view(3, 10, 7)
    assert torch.equal(merged, whole[0] - 2 * whole[2])


def test_every_so_many_th_block_is_given_where_a_step_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", 21)
    found = torch.cat(list(stacked().blocks(4)), dim=1)
    assert torch.equal(found, torch.arange(210.0).view(3, 10, 7)[:, ::4])


@pytest.mark.parametrize("name", ["factors", "delta", "joint", "core", "tucker"])
def test_what_a_reader_does_to_a_block_of_its_own_is_not_seen_by_the_next(name: str) -> None:
    space = Registry().spaces[name]
    for part in space(space.Params()).encode(random_updates(9, 8, [2, 3]), [1.0, 1.0]).parts:
        before = [block.clone() for block in part.blocks()]
        for block in part.blocks():
            own = part.own(block)
            assert own.is_contiguous()
            own.fill_(torch.nan)
        assert all(torch.equal(a, b) for a, b in zip(before, part.blocks(), strict=True))


def test_only_stored_blocks_are_copied_to_be_overwritten() -> None:
    (computed,) = DeltaSpace(SpaceParams()).encode(random_updates(9, 8, [2, 3]), [1.0, 1.0]).parts
    for part in (computed, stacked()):
        (block,) = part.blocks()
        assert (part.own(block) is block) == part.is_computed


def test_magnitudes_leave_the_coordinates_as_they_are() -> None:
    part = Part.stacked("core", torch.tensor([[[1.0, -2.0], [-3.0, 4.0]]]), [1.0])
    assert torch.equal(torch.cat(list(part.magnitudes())), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    assert part.magnitudes_at([(1, 4, 0)]) == [(1.0, 4.0, 0.0)]
    assert part.read(slice(None))[0, 0, 1] == -2.0


def test_an_empty_part_merges_to_an_empty_matrix() -> None:
    part = Part.stacked("core", torch.zeros(2, 0, 5), [1.0, 1.0])
    assert part.merged(lambda block: block.sum(dim=0)).shape == (0, 5)


def test_a_merged_part_lies_in_scratch_space(tmp_path: Path) -> None:
    part = stacked(300, 200)
    memory = part.merged(lambda block: block.sum(dim=0))
    with scratch_space(tmp_path, 0):
        kept = held(lambda: part.merged(lambda block: block.sum(dim=0))).kept_bytes
        merged = part.merged(lambda block: block.sum(dim=0))
    assert torch.equal(merged, memory)
    assert kept < merged.nbytes / 4
