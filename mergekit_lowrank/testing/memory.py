"""How much memory a piece of work holds, measured."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["Held", "held"]


@dataclass(frozen=True)
class Held:
    """Bytes on the CPU, beyond those held before.

    Attributes:
        peak_bytes: the most at one time. The peaks of torch and of Python (numpy's arrays among its own) are added
            although they need not coincide, so this errs upwards.
        kept_bytes: what the result holds.
    """

    peak_bytes: int
    kept_bytes: int


def held(work: Callable[[], object]) -> Held:
    """What ``work`` holds, temporaries inside torch's operators included.

    What is imported or cached at a first time counts too: do something like it before, on less.
    """
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tracemalloc.start()
        try:
            result = work()
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    del result
    in_torch = [0, *accumulate(_allocations(profiled))]
    return Held(max(in_torch) + peak, in_torch[-1] + kept)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing from before is freed within it, which would hide as much that is allocated."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _allocations(profiled: profile) -> list[int]:
    """Bytes of torch's allocations (positive) and frees (negative), in order."""
    results: Any = profiled.profiler
    memory = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
