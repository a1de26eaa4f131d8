"""What an executor is given and what it gives back."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

__all__ = ["Executor", "Inputs", "Job", "Ledger", "Result", "Work", "available_processors", "intra_op_threads"]

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One module's share of the work.

    Attributes:
        index: its place among all jobs; what ``Work`` knows it by.
        name: the module, for people.
        peak_bytes: what it holds at most, from its read to its end.
    """

    index: int
    name: str
    peak_bytes: int


class Work(ABC, Generic[Inputs, Result]):
    """What is to be done, the same for every job. It can be pickled, and is sent to each worker once.

    Results are small, and can be pickled too. A job may be done again where a worker was lost.
    """

    @abstractmethod
    def read(self, job: Job) -> Inputs:
        """What the job needs; mostly waits for the disk."""

    @abstractmethod
    def run(self, job: Job, inputs: Inputs) -> Result:
        """Do the job; mostly computes."""

    def arrive(self, worker: int, workers: int) -> None:
        """Called once in a worker that is a process of its own, before its first job.

        Args:
            worker: its number, from 0.
            workers: how many there are on its machine, at most.
        """

    @property
    def needs_gpu(self) -> bool:
        """Whether jobs are done on a GPU."""
        return False


class Executor(ABC):
    """Runs jobs and yields their results, in any order. A failing job stops the run; its error is raised.

    A merge runs it several times where modules are looked at before they are merged.

    Class attributes:
        name: as ``--executor`` calls it.
        summary: one sentence.
        shares_files: whether what one worker writes into a file the others see at once, as on one machine. Else modules
            are written to files of their own and put together at the end.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    shares_files: ClassVar[bool] = True

    def __init__(self, workers: int | None = None) -> None:
        """An executor.

        Args:
            workers: jobs that run at once; by default one for each processor this process may use.
        """
        self.workers = workers or available_processors()

    @abstractmethod
    def run(self, work: Work[Inputs, Result], jobs: Sequence[Job], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come.

        Args:
            work: what to do.
            jobs: in file order.
            memory_bytes: the sum of ``peak_bytes`` of the jobs in flight on a machine stays below it, except that one
                job always runs.

        Raises:
            InterruptedMergeError: workers were lost; the jobs that are done need not be done again.
        """

    def close(self) -> None:
        """Let go of what is kept from one run to the next, such as processes."""


class Ledger:
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
        """A job of ``size`` bytes has ended."""
        with self._lock:
            self._promised -= size


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Within it torch uses ``count`` threads inside one operation, so that results do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
