"""Modules as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from mergekit_lowrank import Executor, MergeError, __version__
from mergekit_lowrank.errors import InterruptedMergeError
from mergekit_lowrank.executors import Inputs, Job, Result, Work, reply_of, result_of

__all__ = ["RayExecutor"]

RETRIES = 4
"""How often a module is begun again after its worker, or the machine under it, was lost; Ray's own number is 3."""
SAME_PACKAGES = "Install the same packages, and the plugins that the merge uses, on every machine of the cluster."
REACHABLE_SECONDS = 30
"""How long a cluster may take to answer."""
SETTLING_SECONDS = 60
"""How long modules in flight are waited for after an error; a machine that is lost does not answer."""


class RayExecutor(Executor):
    """A task for each module: where and when it runs, and how often it is tried, is left to Ray.

    The cluster is that of ``RAY_ADDRESS``, or the one that the program is connected to; where there is neither, one is
    started on this machine and ended with the merge. Its machines see the directories of inputs and output under the
    same paths. A module takes a processor, the memory that its merge holds, and a GPU where modules are merged on GPUs.
    """

    name = "ray"
    summary = "several modules at once on the machines of a Ray cluster that share a file system"
    shares_files = False

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(workers)
        self._limit, self._has_started = workers, False

    def run(self, work: Work[Inputs, Result], jobs: Sequence[Job], *, memory_bytes: int) -> Iterator[Result]:
        """The results as they come.

        Raises:
            InterruptedMergeError: a module's workers were lost more often than it is tried, or the cluster was.
            MergeError: there is no cluster at ``RAY_ADDRESS``, or the work cannot be sent there.
        """
        import ray  # takes a second, and most merges run without it

        with _same_signals():
            self._connect(memory_bytes)
        with _lost_workers():
            submit, waiting = _submitter(work), iter(jobs)
            pending = [submit(job) for job in islice(waiting, self._limit)]
            try:
                while pending:
                    done, pending = ray.wait(pending)
                    pending += [submit(job) for job in islice(waiting, len(done))]
                    yield from map(result_of, ray.get(done))
            finally:
                _settle(pending)

    def close(self) -> None:
        """End the cluster if it was started here."""
        if self._has_started:
            import ray

            ray.shutdown()
            self._has_started = False

    def _connect(self, memory_bytes: int) -> None:
        import ray

        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            try:
                _check_reachable(address)
                ray.init(address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                raise MergeError(f"RAY_ADDRESS={address}: there is no Ray cluster ({error}).") from error
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init("local", num_cpus=self.workers, _memory=memory_bytes, include_dashboard=False, **quiet)
        self._has_started = True


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray would try for many minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS).close()


@contextmanager
def _same_signals() -> Iterator[None]:
    """Within it, what ``ray.init`` does to SIGTERM is undone: the command line says what is kept, and ends as asked."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _lost_workers() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:  # what modules raise comes in their replies
        raise MergeError(f"a Ray worker cannot read the merge ({_first_line(error.cause)}). {SAME_PACKAGES}") from error
    except ray.exceptions.RayError as error:
        raise InterruptedMergeError(
            f"Ray gave up a module ({type(error).__name__}: {_first_line(error)}). Where memory ran out, let "
            "fewer of them run on a machine (ray start --memory)"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _submitter(work: Work[Any, Any]) -> Callable[[Job], Any]:
    """What sends a job to the cluster, and gives the reference to its reply."""
    import ray

    try:
        parcel = ray.put((_versions(), ray.cloudpickle.dumps(work)))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise MergeError(
            f"executor 'ray': the merge cannot be sent to another machine ({error}). Use the executor threads."
        ) from error
    # By default Ray ends a process after each task that had a GPU.
    reply = ray.remote(num_cpus=1, num_gpus=int(work.needs_gpu), max_retries=RETRIES, max_calls=0)(_reply)
    room = _room(needs_gpu=work.needs_gpu)

    def submit(job: Job) -> Any:
        return reply.options(memory=min(job.peak_bytes, room), name=job.name).remote([parcel], job)

    return submit


def _room(*, needs_gpu: bool) -> int:
    """The most memory that a task can ask for: it would wait forever for more."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    useful = [own for own in resources if own.get("CPU", 0) >= 1 and own.get("GPU", 0) >= needs_gpu]
    return int(max((own.get("memory", 0) for own in useful), default=0))


def _settle(pending: Sequence[Any]) -> None:
    """Nothing must be written once another merge may begin."""
    import ray

    if pending and ray.is_initialized():
        for reference in pending:
            ray.cancel(reference)
        ray.wait(list(pending), num_returns=len(pending), timeout=SETTLING_SECONDS, fetch_local=False)


class _Here:
    """What a worker keeps from one task to the next: the work it got last."""

    def __init__(self) -> None:
        self._parcel: Any = None
        self._work: Work[Any, Any]

    def done(self, parcel: Any, job: Job) -> Any:
        """The result of a job."""
        if parcel != self._parcel:
            self._work = _unpacked(parcel)
            torch.set_num_threads(1)
            self._work.arrive(0, 1)  # Ray shows it the GPUs that it may use, and no others
            self._parcel = parcel
        return self._work.run(job, self._work.read(job))


_here = _Here()


def _reply(parcels: Sequence[Any], job: Job) -> bytes:
    """In a worker: do a job. The reference to its work stands in a list, so that Ray does not fetch it each time."""
    return reply_of(lambda: _here.done(parcels[0], job))


def _unpacked(parcel: Any) -> Work[Any, Any]:
    import ray

    theirs, pickled = ray.get(parcel)
    if theirs != _versions():
        raise MergeError(
            f"a Ray worker has {_shown(_versions())}, and the merge was begun with {_shown(theirs)}. {SAME_PACKAGES}"
        )
    try:
        return pickle.loads(pickled)  # type: ignore[no-any-return]  # noqa: S301 - from the merge that sent it
    except Exception as error:
        raise MergeError(f"a Ray worker cannot read the merge ({_first_line(error)}). {SAME_PACKAGES}") from error


def _versions() -> dict[str, str]:
    """What decides the bytes of a result; builds of torch for other processors are the same version."""
    return {"mergekit-lowrank": __version__, "torch": torch.__version__.partition("+")[0]}


def _shown(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
