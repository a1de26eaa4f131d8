"""Sizes are shown as people write them."""

import platform
import subprocess
import sys

import pytest

from mergekit_lowrank.engine import default_memory_bytes, format_bytes

FAULTS = """
import resource
import torch
from mergekit_lowrank.engine.memory import recycle_freed_memory
recycle_freed_memory()
torch.set_num_threads(1)
def work():
    for _ in range(20):
        held = [torch.ones(1 << 21) for _ in range(4)]
        del held
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written(count, text) -> None:
    assert format_bytes(count) == text


def test_the_default_is_some_of_the_machines_memory() -> None:
    assert 1 << 26 < default_memory_bytes() < 1 << 46


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    # 163,840 pages are written to; without recycling, in most runs all of them are new.
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000
