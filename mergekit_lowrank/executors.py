"""How the modules of a merge are scheduled: one after the other, or several at once within a memory budget."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

__all__ = ["Executor", "Job", "SerialExecutor", "ThreadExecutor", "intra_op_threads"]

Result = TypeVar("Result")

PREFETCHED = 2
"""Modules that may be read ahead, beyond those being merged."""


@dataclass(frozen=True)
class Job(Generic[Result]):
    """One module's work, in two steps so that reading overlaps with computing.

    Attributes:
        name: the module.
        peak_bytes: what it holds at most, from its read to its end.
        read: gives the inputs; mostly waits for the disk.
        work: merges them; mostly computes.
    """

    name: str
    peak_bytes: int
    read: Callable[[], Any]
    work: Callable[[Any], Result]


class Executor(ABC):
    """Runs jobs and yields their results, in any order. A failing job stops the run; its error is raised."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def run(self, jobs: Sequence[Job[Result]], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come.

        Args:
            jobs: in file order.
            memory_bytes: the sum of ``peak_bytes`` of the jobs in flight stays below it, except that one job always
                runs.
        """


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Within it torch uses ``count`` threads inside one operation, so that results do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SerialExecutor(Executor):
    """One module after the other, in the calling thread."""

    name = "serial"
    summary = "one module after the other"

    def run(self, jobs: Sequence[Job[Result]], *, memory_bytes: int) -> Iterator[Result]:
        """The results in order."""
        del memory_bytes
        for job in jobs:
            with intra_op_threads(1):
                result = job.work(job.read())
            yield result


class ThreadExecutor(Executor):
    """A pool of threads over modules, one intra-op thread each, fed by one thread that reads ahead in file order.

    Args:
        workers: modules merged at once; by default one for each processor this process may use.
    """

    name = "threads"
    summary = "several modules at once, one thread each, reading ahead"

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or available_processors()

    def run(self, jobs: Sequence[Job[Result]], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come."""
        ledger = _Ledger(memory_bytes)
        limit = self.workers + PREFETCHED
        with (
            intra_op_threads(1),
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(self.workers, "merge", lambda: torch.set_num_threads(1)) as workers,
        ):
            running: set[Future[Result]] = set()
            waiting = iter(jobs)
            job = next(waiting, None)
            try:
                while job or running:
                    while job and len(running) < limit and ledger.admits(job.peak_bytes):
                        running.add(workers.submit(_finish, job, reader.submit(job.read), ledger))
                        job = next(waiting, None)
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                reader.shutdown(wait=False, cancel_futures=True)
                workers.shutdown(wait=False, cancel_futures=True)


def _finish(job: Job[Result], read: Future[Any], ledger: _Ledger) -> Result:
    try:
        return job.work(read.result())
    finally:
        ledger.release(job.peak_bytes)


class _Ledger:
    """Bytes promised to the jobs in flight."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._promised, self._lock = limit_bytes, 0, threading.Lock()

    def admits(self, size: int) -> bool:
        """Whether a job of ``size`` bytes fits now; if so they are promised to it. One job always fits."""
        with self._lock:
            if self._promised and self._promised + size > self._limit:
                return False
            self._promised += size
            return True

    def release(self, size: int) -> None:
        with self._lock:
            self._promised -= size


def available_processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
