"""Modules merged by several processes of this machine, such as one for each of its GPUs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mergekit_lowrank.errors import InterruptedMergeError, MergeError
from mergekit_lowrank.executors.base import Executor, Inputs, Job, Ledger, Result, Work
from mergekit_lowrank.executors.replies import reply_of, result_of

__all__ = ["ProcessExecutor"]


class ProcessExecutor(Executor):
    """Processes that are started anew (no state is inherited), one intra-op thread each; each reads for itself.

    They are kept from one run to the next.
    """

    name = "processes"
    summary = "several modules at once, one process each: for several GPUs, or many processors"

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(workers)
        self._processes: list[_Process] = []

    def run(self, work: Work[Inputs, Result], jobs: Sequence[Job], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come.

        Raises:
            InterruptedMergeError: a worker died, or none could start.
            MergeError: the work cannot be pickled.
        """
        ledger, waiting = Ledger(memory_bytes), iter(jobs)
        count = self._useful(jobs, memory_bytes)
        parcel = _pickled(work, count)
        idle, busy = self._started(count), dict[_Process, Job]()
        for process in idle:
            process.expect(parcel)
        job = next(waiting, None)
        try:
            while job or busy:
                while job and idle and ledger.admits(job.peak_bytes):
                    process = idle.pop(0)
                    busy[process] = job
                    process.begin(job)
                    job = next(waiting, None)
                answered = wait([process.connection for process in busy])
                for process in [process for process in busy if process.connection in answered]:
                    ledger.release(busy.pop(process).peak_bytes)
                    idle.append(process)
                    yield process.result()
        finally:
            for process in busy:
                process.settle()

    def close(self) -> None:
        """Let the processes end."""
        for process in self._processes:
            process.connection.close()
        for process in self._processes:
            process.join()
        self._processes.clear()

    def _useful(self, jobs: Sequence[Job], memory_bytes: int) -> int:
        """How many jobs can be done at once."""
        sizes = accumulate(sorted(job.peak_bytes for job in jobs))
        return min(self.workers, max(1, sum(size <= memory_bytes for size in sizes)))

    def _started(self, count: int) -> list[_Process]:
        self._processes += [_Process(number) for number in range(len(self._processes), count)]
        return self._processes[:count]


class _Process:
    """A worker, seen from where the jobs come from.

    Args:
        number: from 0.
    """

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, number), daemon=True)
        self._process.start()
        other.close()
        self._parcel, self._has_answered = b"", False

    def expect(self, parcel: bytes) -> None:
        """The jobs to come are of this work, which goes with the first of them."""
        self._parcel = parcel

    def begin(self, job: Job) -> None:
        """Send a job."""
        try:
            self.connection.send_bytes(self._parcel)
            self.connection.send(job)
        except OSError as error:
            raise self._lost() from error
        self._parcel = b""

    def result(self) -> Any:
        """What the job gives; waits for it."""
        try:
            reply = self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        self._has_answered = True
        return result_of(reply)

    def settle(self) -> None:
        """Wait until the job has ended, well or not."""
        with suppress(EOFError, OSError):
            self.connection.recv_bytes()

    def join(self) -> None:
        """Wait until the process has ended."""
        self._process.join()

    def _lost(self) -> InterruptedMergeError:
        self._process.join()
        status = self._process.exitcode or 0
        if not self._has_answered and status > 0:
            return InterruptedMergeError(
                f"a worker process could not start (exit status {status}). A script merges with processes only below "
                "the line: if __name__ == '__main__':"
            )
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return InterruptedMergeError(
            f"a worker process {how}, perhaps for lack of memory. Use fewer (--workers), or allow less (--memory)"
        )


def _pickled(work: Work[Any, Any], workers: int) -> bytes:
    try:
        return pickle.dumps((work, workers))
    except Exception as error:
        raise MergeError(
            f"executor 'processes': the merge cannot be sent to another process ({error}). Put the classes of methods "
            "and formats into a module that can be imported, or use the executor threads."
        ) from error


def _serve(connection: Connection, number: int) -> None:
    """Be a worker until nobody sends jobs any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever sends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    here = _Here(number)
    with suppress(EOFError, OSError):
        while True:
            parcel, job = connection.recv_bytes(), connection.recv()
            connection.send_bytes(reply_of(partial(here.done, parcel, job)))


def _end_with_parent() -> None:
    """Nothing must be written once another merge may have begun."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Here:
    """What a worker keeps from one job to the next."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._work: Work[Any, Any]

    def done(self, parcel: bytes, job: Job) -> Any:
        """The result of a job; of other work than the last one where that came with it."""
        if parcel:
            self._work, workers = pickle.loads(parcel)  # noqa: S301 - from the parent process
            self._work.arrive(self._number, workers)
        return self._work.run(job, self._work.read(job))
