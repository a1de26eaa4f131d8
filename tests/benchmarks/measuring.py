"""Seconds and memory of one call, calls in processes of their own, contenders in turn."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Of one run: wall_seconds, cpu_seconds (user and system, all threads), peak_bytes where it is known, and more."""

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.005
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["tests.benchmarks.limits", "tests.benchmarks.peers"]
"""With what they import. Libraries that only one peer needs are imported there, before the clock starts."""
PATIENCE_SECONDS = 60.0
"""A contender whose first run took longer is not run again."""


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process now; None where the system does not say (only Linux does)."""
    if not STATUS.exists():
        return None
    with STATUS.open() as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


class PeakMemory:
    """The most anonymous memory beyond that on entering, sampled by a thread; ``peak_bytes`` is None if unknown."""

    def __enter__(self) -> PeakMemory:
        self.before = self.highest = anonymous_bytes()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.before is not None:
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.before is not None:
            self._watcher.join()

    @property
    def peak_bytes(self) -> int | None:
        return None if self.before is None else self.highest - self.before


def measured(work: Callable[[], object]) -> Figures:
    """The figures of one call, here and now."""
    with PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_bytes": memory.peak_bytes}


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns in a process of its own, forked from one that has imported the libraries where that can be.

    Raises:
        SystemExit: it failed there.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        failure, result = receiver.recv()
    except EOFError:
        failure, result = "it died without a word (out of memory?)", None
    finally:
        receiver.close()
        process.join()
    if failure:
        raise SystemExit(f"{function.__name__}: {failure}")
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        sender.send(("", function(*arguments)))
    except Exception:
        sender.send((traceback.format_exc(), None))


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: its label.
        function: does the work and returns its figures.
        arguments: picklable.
    """

    name: str
    function: Callable[..., Figures]
    arguments: tuple[Any, ...] = ()


def in_turn(
    contenders: Sequence[Contender], runs: int, *, patience: float = PATIENCE_SECONDS
) -> dict[str, list[Figures]]:
    """The figures of ``runs`` rounds in which each contender takes its turn, in a process of its own."""
    found: dict[str, list[Figures]] = {contender.name: [] for contender in contenders}
    for _ in range(runs):
        for contender in contenders:
            before = found[contender.name]
            if before and before[0]["wall_seconds"] > patience:
                continue
            before.append(isolated(contender.function, *contender.arguments))
            say(f"  {contender.name}: {before[-1]['wall_seconds']:.3g} s")
    return found


def spread(values: Sequence[float]) -> Figures:
    """Median, least and greatest of some runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
