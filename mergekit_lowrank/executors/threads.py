"""Modules merged within this process: one after the other, or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from mergekit_lowrank.executors.base import Executor, Inputs, Job, Ledger, Result, Work, intra_op_threads

__all__ = ["SerialExecutor", "ThreadExecutor"]

PREFETCHED = 2
"""Modules that may be read ahead, beyond those being merged."""


class SerialExecutor(Executor):
    """One module after the other, in the calling thread."""

    name = "serial"
    summary = "one module after the other"

    def __init__(self, workers: int | None = None) -> None:
        """There is one worker, whatever is asked for."""
        del workers
        super().__init__(1)

    def run(self, work: Work[Inputs, Result], jobs: Sequence[Job], *, memory_bytes: int) -> Iterator[Result]:
        """The results in order."""
        del memory_bytes
        for job in jobs:
            with intra_op_threads(1):
                result = work.run(job, work.read(job))
            yield result


class ThreadExecutor(Executor):
    """A pool of threads over modules, one intra-op thread each, fed by one thread that reads ahead in file order."""

    name = "threads"
    summary = "several modules at once, one thread each, reading ahead"

    def run(self, work: Work[Inputs, Result], jobs: Sequence[Job], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come."""
        ledger = Ledger(memory_bytes)
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
                        running.add(workers.submit(_finish, work, job, reader.submit(work.read, job), ledger))
                        job = next(waiting, None)
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                reader.shutdown(wait=False, cancel_futures=True)
                workers.shutdown(wait=False, cancel_futures=True)


def _finish(work: Work[Inputs, Result], job: Job, read: Future[Inputs], ledger: Ledger) -> Result:
    try:
        return work.run(job, read.result())
    finally:
        ledger.release(job.peak_bytes)
