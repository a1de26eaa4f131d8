"""How a merge is divided among processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.engine.units import Unit, files_together, share_of


def batches_of_sizes(sizes: list[list[int]]) -> list[list[Unit]]:
    return [[Unit(f"{n}.{m}", size, size) for m, size in enumerate(own)] for n, own in enumerate(sizes)]


SIZES = st.lists(st.lists(st.integers(0, 10**12), min_size=1, max_size=3), max_size=30)


@given(SIZES, st.integers(1, 9))
def test_every_batch_is_in_one_share_and_shares_keep_the_order(sizes: list[list[int]], count: int) -> None:
    batches = batches_of_sizes(sizes)
    shares = [share_of(batches, index, count) for index in range(count)]
    assert all(share == [batch for batch in batches if batch in share] for share in shares)
    found = [batch[0].name for share in shares for batch in share]
    assert sorted(found) == sorted(batch[0].name for batch in batches)


@given(SIZES, st.integers(1, 9))
def test_shares_differ_by_no_more_than_the_largest_batch(sizes: list[list[int]], count: int) -> None:
    batches = batches_of_sizes(sizes)
    loads = [
        sum(unit.size_bytes for batch in share_of(batches, index, count) for unit in batch) for index in range(count)
    ]
    assert max(loads) - min(loads) <= max((sum(own) for own in sizes), default=0)


def test_files_of_tied_tensors_are_written_together() -> None:
    place = {"embed": "1", "norm": "2", "q": "3", "other": "4", "head": "5", "alias": "3"}
    tied = {"embed": ("head",), "other": ("alias",)}
    layout = SimpleNamespace(files=dict.fromkeys(sorted(place.values())), weight_map=place)
    fold: Any = SimpleNamespace(
        layout=layout,
        keys={"embed": "embed", "q": "q", "other": "other"},
        base=SimpleNamespace(partners=lambda key: tied.get(key, ())),
    )
    assert files_together(fold) == {"1": "1", "2": "2", "3": "3", "4": "3", "5": "1"}
