from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mergekit_lowrank.lowrank import RadixSelection, kth_magnitudes
from mergekit_lowrank.lowrank import selection as selection_module
from mergekit_lowrank.lowrank.selection import order_statistics
from mergekit_lowrank.testing.memory import held

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}
SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-38, 1.0, -1.0, 1.0, 3.4e38, -2.0])


def values_of(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    width = dtype.itemsize * 8
    numbers = st.one_of(
        st.floats(allow_nan=False, allow_infinity=False, width=width),  # type: ignore[arg-type]
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]),
    )
    return arrays(FLOATS[dtype], st.integers(1, 40), elements=numbers).map(torch.from_numpy)


LIMITS = pytest.mark.parametrize("limits", [(1 << 24, 0), (0, 1 << 24), (0, 0)], ids=["gathered", "bracket", "counted"])
BRACKETS = pytest.mark.parametrize("limits", [(0, 1 << 24), (0, 0)], ids=["bracket", "counted"])


def set_limits(patched: pytest.MonkeyPatch, limits: tuple[int, int]) -> None:
    for name, value in zip(("IN_MEMORY_ENTRIES", "BRACKETED_ENTRIES"), limits, strict=True):
        patched.setattr(selection_module, name, value)


def sorted_magnitude(values: Tensor, k: int) -> float:
    return float(values.abs().flatten().sort().values[k - 1]) if k else 0.0


def of_all(values: Tensor, k: int) -> float:
    """The same from one block that holds all values."""
    (found,) = kth_magnitudes(lambda _: [values[None]], [k], values.numel(), values.dtype)
    return found


def by_passes(values: Tensor, k: int, pieces: int) -> float:
    """The same through digit counts over pieces that are never held together."""
    selection = RadixSelection(values.dtype, k)
    passes = 0
    while not selection.done:
        counts = [selection.count(piece) for piece in torch.tensor_split(values, pieces)]
        selection = selection.narrowed(np.sum(counts, axis=0))
        passes += 1
    assert passes in {0, selection.levels}
    return selection.value


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_radix_passes_find_the_same_magnitude_over_any_pieces(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(values_of(dtype))
    k, pieces = data.draw(st.integers(0, values.numel())), data.draw(st.integers(1, 5))
    assert by_passes(values, k, pieces) == sorted_magnitude(values, k)


@pytest.mark.parametrize("k", range(12))
def test_zeros_denormals_and_ties_are_ordered_exactly(k: int) -> None:
    assert of_all(SPECIAL, k) == sorted_magnitude(SPECIAL, k)
    assert by_passes(SPECIAL, k, 3) == sorted_magnitude(SPECIAL, k)


@pytest.mark.parametrize(("k", "expected"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 3.0)])
def test_ties_count_each(k: int, expected: float) -> None:
    assert of_all(torch.tensor([[-2.0, 1.0], [2.0, -3.0]]), k) == expected


def test_views_that_are_not_contiguous_are_read_right() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert of_all(values.T, 5) == 4.0
    assert of_all(values[:, ::2], 2) == 2.0
    assert of_all(values[:, :1].expand(3, 5), 5) == 0.0


def stacked(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 10, 7, generator=generator, dtype=dtype)
    values[0, :4] = 0.0
    values[1] = values[1].round(decimals=1)
    return values


def rows(values: Tensor, width: int) -> Callable[[int], Iterator[Tensor]]:
    def blocks(step: int) -> Iterator[Tensor]:
        return (values[:, start : start + width] for start in range(0, values.shape[1], width * step))

    return blocks


@pytest.mark.parametrize("dtype", FLOATS)
@LIMITS
@pytest.mark.parametrize("ks", [(0, 0, 0), (1, 1, 1), (70, 70, 70), (28, 29, 56), (0, 35, 70)])
@pytest.mark.parametrize("width", [1, 3, 10])
def test_each_of_several_inputs_gets_its_own_kth_magnitude(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limits: tuple[int, int], ks: tuple[int, int, int], width: int
) -> None:
    set_limits(monkeypatch, limits)
    values = stacked(0, dtype)
    found = kth_magnitudes(rows(values, width), ks, 70, dtype)
    assert found == [sorted_magnitude(values[t], k) for t, k in enumerate(ks)]


@BRACKETS
@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_bracket_finds_any_magnitude_of_any_values(
    limits: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    values = data.draw(values_of(dtype))[None]
    k, width = data.draw(st.integers(0, values.numel())), data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as patched:
        set_limits(patched, limits)
        found = kth_magnitudes(rows(values, width), [k], values.numel(), dtype)
    assert found == [sorted_magnitude(values, k)]


@BRACKETS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 5_000, 40_000, 79_999, 80_000])
def test_a_narrow_bracket_around_the_sampled_quantile_is_exact(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], dtype: torch.dtype, k: int
) -> None:
    set_limits(monkeypatch, limits)
    monkeypatch.setattr(selection_module, "SAMPLE_ENTRIES", 1 << 8)
    values = torch.randn(1, 400, 200, generator=torch.Generator().manual_seed(3), dtype=dtype)
    assert kth_magnitudes(rows(values, 7), [k], 80_000, dtype) == [sorted_magnitude(values, k)]


@BRACKETS
@pytest.mark.parametrize("k", [1, 100, 300, 399, 400])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_answer_that_the_sample_misses_is_found_by_radix_passes(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], dtype: torch.dtype, k: int
) -> None:
    set_limits(monkeypatch, limits)
    # Every fourth row, the sampled ones, is far larger than the others.
    values = torch.randn(1, 40, 10, generator=torch.Generator().manual_seed(3), dtype=dtype)
    values[:, ::4] *= 1e6
    assert kth_magnitudes(rows(values, 1), [k], 400, dtype) == [sorted_magnitude(values, k)]


@LIMITS
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_several_ranks_of_an_input_are_found_together(limits: tuple[int, int], data: st.DataObject) -> None:
    values = data.draw(values_of(torch.float32)).abs()
    both = torch.stack([values, values.flip(0) / 2])
    ranks = data.draw(st.lists(st.tuples(*[st.integers(0, values.numel())] * 3), min_size=2, max_size=2))
    width = data.draw(st.integers(1, 9))

    def blocks(step: int) -> Iterator[Tensor]:
        return (block.clone() for block in rows(both, width)(step))

    with pytest.MonkeyPatch.context() as patched:
        set_limits(patched, limits)
        found = order_statistics(blocks, ranks, values.numel(), torch.float32)
    expected = [tuple(sorted_magnitude(own, k) for k in ks) for own, ks in zip(both, ranks, strict=True)]
    assert found == expected


@LIMITS
def test_the_entries_are_not_overwritten(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]) -> None:
    set_limits(monkeypatch, limits)
    values = stacked(1, torch.float32)
    before = values.clone()
    kth_magnitudes(rows(values, 10), [5, 6, 7], 70, torch.float32)
    assert torch.equal(values, before)


def test_nothing_is_read_where_no_rank_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_module, "IN_MEMORY_ENTRIES", 0)
    assert kth_magnitudes(lambda _: pytest.fail("read"), (0, 0), 70, torch.float32) == [0.0, 0.0]


def test_no_entries_at_all_give_zero_thresholds() -> None:
    assert kth_magnitudes(lambda _: iter(()), (0, 0), 0, torch.float32) == [0.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]), max_size=20), low=st.sampled_from([-1.0, 0.0, 1.0]))
def test_a_device_splits_values_as_the_cpu_does(values: list[float], low: float) -> None:
    # The operators that run on a GPU, here on the CPU.
    tensor = torch.tensor(values)
    here, there = (split(tensor, low, 2.0) for split in (selection_module._split, selection_module._split_there))
    assert here[0] == there[0]
    assert here[1].tolist() == there[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_device_counts_digits_as_the_cpu_does(dtype: torch.dtype) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=dtype)
    chosen = RadixSelection(dtype, 200)
    while not chosen.done:
        counts = chosen.count(values)
        assert counts.tolist() == chosen._counted_there(values, chosen.levels - 1 - chosen.level).tolist()
        chosen = chosen.narrowed(counts)


def test_no_block_is_held_beyond_its_turn() -> None:
    def blocks(step: int) -> Iterator[Tensor]:
        for i in range(0, 40, step):
            yield torch.rand(2, 1 << 17, generator=torch.Generator().manual_seed(i))

    everything = held(lambda: list(blocks(1)))
    found = held(lambda: order_statistics(blocks, [(1 << 20,)] * 2, 40 << 17, torch.float32))
    assert found.peak_bytes < everything.peak_bytes / 4
