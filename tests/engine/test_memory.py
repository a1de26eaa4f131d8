"""Sizes are shown as people write them; what a merge may hold is estimated, and what it frees goes back in time."""

import platform
import subprocess
import sys

import pytest

from mergekit_lowrank import Registry
from mergekit_lowrank.engine import default_memory_bytes, format_bytes
from mergekit_lowrank.engine.memory import Footprint, footprint, overhead_bytes
from mergekit_lowrank.spaces import ModuleShape

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")

SETTLED = """
import resource
from types import SimpleNamespace as Object
import torch
from mergekit_lowrank.engine.memory import settle_allocator

torch.set_num_threads(1)


def settled(limit, scratch):
    group = Object(strategy=Object(scratch_entries=lambda *_: scratch), space=None)
    module = Object(peak_bytes=40 << 20, shape=None, group=group)
    settle_allocator([Object(modules=[module], modules_bytes=limit)], 1)


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
"""

FAULTS = """
def work():
    for _ in range(20):
        held = [torch.ones(1 << 21) for _ in range(4)]
        del held

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HOLES = """
before, kept = anonymous_bytes(), []
for _ in range(200):
    block = torch.ones(1 << 19)
    kept.append(block[::16].clone())  # 25 MiB in the end, between blocks of 2 MiB
    del block
print(anonymous_bytes() - before)
"""


def run(*scripts: str) -> int:
    done = subprocess.run([sys.executable, "-c", "\n".join(scripts)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written(count, text) -> None:
    assert format_bytes(count) == text


def test_the_default_is_some_of_the_machines_memory() -> None:
    assert 1 << 26 < default_memory_bytes() < 1 << 46


@needs_glibc
def test_freed_memory_is_used_again_without_new_pages_where_there_is_room() -> None:
    # 163,840 pages are written to; without recycling, in most runs all of them are new.
    assert run(SETTLED, "settled(1 << 30, 0)", FAULTS) < 10_000


@needs_glibc
@pytest.mark.parametrize("settled", ["settled(64 << 20, 0)", "settled(1 << 30, 1)"])
def test_freed_memory_goes_back_where_there_is_no_room_or_matrices_are_dense(settled) -> None:
    assert run(SETTLED, settled, HOLES) < 40 << 20


def test_what_a_merge_holds_by_itself_grows_with_workers_modules_and_headers() -> None:
    least = overhead_bytes(1, 1, 1)
    assert least < min(overhead_bytes(2, 1, 1), overhead_bytes(1, 1000, 1), overhead_bytes(1, 1, 1000))


def test_what_may_lie_on_disk_does_so_where_memory_is_short_and_only_there() -> None:
    whole = Footprint(100, 70)
    assert whole.within(100) == Footprint(100, 0)
    assert whole.within(99) == Footprint(30, 70)


def planned(method: str, shape: ModuleShape, rank: int | None = 16, **keys: bool) -> Footprint:
    registry = Registry()
    preset = registry.method(method)
    space = registry.spaces[preset.space or preset.strategy.spaces[0]]
    strategy = preset.strategy(preset.strategy.Params(**preset.parameters))
    return footprint(shape, strategy, space(space.Params()), stored_bytes=0, rank=rank, compute_bytes=4, **keys)


def test_a_dense_result_may_lie_on_disk_and_a_concatenation_has_nothing_to_put_there() -> None:
    shape = ModuleShape(4096, 4096, (16,) * 4)
    assert planned("ties", shape).scratch_bytes == 2 * 4096 * 4096 * 4
    assert planned("linear", shape).scratch_bytes == 0


def test_a_higher_rank_of_a_dense_result_takes_more_and_none_takes_least() -> None:
    shape = ModuleShape(4096, 4096, (4096,) * 2, dense=2)
    ranks = [planned("ties", shape, rank).peak_bytes for rank in (None, 64, 256)]
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("key", ["canonical", "balanced"])
def test_canonical_factors_take_more(key) -> None:
    shape = ModuleShape(4096, 4096, (64,) * 4)
    assert planned("linear", shape, **{key: True}).peak_bytes > planned("linear", shape).peak_bytes
