"""Executors run every job, within the memory promised, and stop at the first failure."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from mergekit_lowrank.errors import CheckpointError, InterruptedMergeError, MergeError
from mergekit_lowrank.executors import (
    Executor,
    Job,
    ProcessExecutor,
    SerialExecutor,
    ThreadExecutor,
    Work,
    WorkerError,
    intra_op_threads,
    reply_of,
    result_of,
)


class Calls(Work[int, object]):
    """Job n reads n, and gives what a function makes of it."""

    def __init__(self, function: Callable[[int], object], *, read: Callable[[int], int] = int) -> None:
        self.function, self.reading, self.worker = function, read, (-1, -1)

    def arrive(self, worker: int, workers: int) -> None:
        self.worker = worker, workers

    def read(self, job: Job) -> int:
        return self.reading(job.index)

    def run(self, job: Job, inputs: int) -> object:
        return self.function(inputs)


class Arrivals(Calls):
    def run(self, job: Job, inputs: int) -> object:
        time.sleep(0.02)  # so that no worker takes all jobs
        return self.worker, os.getpid()


def jobs_of(count: int, size: int = 1) -> list[Job]:
    return [Job(n, str(n), size) for n in range(count)]


def doubled(value: int) -> int:
    return 2 * value


def threads_of(_: int) -> int:
    return torch.get_num_threads()


def fails_early(value: int) -> int:
    if value < 5:  # whichever worker is ready first
        raise ValueError(f"job {value} failed")
    return value


def cannot_be_read(_: int) -> int:
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
        raise CheckpointError("an input cannot be read") from error


def dies_at_three(value: int) -> int:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


class Logged:
    """Writes when it begins and when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, value: int) -> int:
        self.say("+")
        time.sleep(0.01)
        self.say("-")
        return value

    def say(self, sign: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{sign}1\n")


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes, kept: they take seconds to start."""
    executor = ProcessExecutor(2)
    yield executor
    executor.close()


@pytest.fixture(params=["serial", "one thread", "threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Executor:
    made = {"serial": SerialExecutor(), "one thread": ThreadExecutor(1), "threads": ThreadExecutor(3)}
    return made.get(request.param) or request.getfixturevalue("processes")


def test_every_job_gives_its_result_once(executor: Executor) -> None:
    assert sorted(executor.run(Calls(doubled), jobs_of(25), memory_bytes=100)) == [2 * n for n in range(25)]


def test_no_jobs_give_no_results(executor: Executor) -> None:
    assert list(executor.run(Calls(doubled), [], memory_bytes=100)) == []


def test_jobs_in_flight_stay_within_the_memory_promised(executor: Executor, tmp_path: Path) -> None:
    work = Calls(Logged(tmp_path / "log"))
    list(executor.run(work, jobs_of(20, size=10), memory_bytes=19))
    in_flight = list(accumulate(map(int, (tmp_path / "log").read_text().split())))
    assert (len(in_flight), max(in_flight)) == (40, 1)


def test_a_job_larger_than_the_memory_still_runs_alone(executor: Executor) -> None:
    assert list(executor.run(Calls(doubled), jobs_of(3, size=1000), memory_bytes=1)) == [0, 2, 4]


def test_the_first_failure_is_raised_and_stops_the_run(executor: Executor, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    with pytest.raises(ValueError, match=r"job \d failed"):
        list(executor.run(Calls(fails_early, read=Noted(begun)), jobs_of(200), memory_bytes=10**9))
    assert len(list(begun.iterdir())) < 200
    assert sorted(executor.run(Calls(doubled), jobs_of(2), memory_bytes=10)) == [0, 2]


class Noted:
    """Leaves a file for each job that is read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, value: int) -> int:
        (self.directory / str(value)).touch()
        return value


def test_a_failing_read_is_raised_with_its_cause(executor: Executor) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        list(executor.run(Calls(doubled, read=cannot_be_read), jobs_of(1), memory_bytes=10))
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EIO


def test_work_runs_with_one_thread_inside_an_operation(executor: Executor) -> None:
    before = torch.get_num_threads()
    assert list(executor.run(Calls(threads_of), jobs_of(6), memory_bytes=10)) == [1] * 6
    assert torch.get_num_threads() == before


def test_results_may_be_left_unread(executor: Executor) -> None:
    results = executor.run(Calls(doubled), jobs_of(10), memory_bytes=10**9)
    next(results)
    results.close()
    assert sorted(executor.run(Calls(doubled), jobs_of(2), memory_bytes=10)) == [0, 2]


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), intra_op_threads(1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


class TestProcesses:
    def test_each_has_a_number_and_is_kept(self, processes: Executor) -> None:
        first, second = (set(processes.run(Arrivals(doubled), jobs_of(20), memory_bytes=99)) for _ in range(2))
        assert first == second
        assert {worker for worker, _ in first} == {(0, 2), (1, 2)}
        assert len({pid for _, pid in first} - {os.getpid()}) == 2

    def test_there_are_no_more_than_can_work_at_once(self) -> None:
        executor = ProcessExecutor(8)
        try:
            found = set(executor.run(Arrivals(doubled), jobs_of(4, size=10), memory_bytes=19))
        finally:
            executor.close()
        assert [worker for worker, _ in found] == [(0, 1)]

    def test_one_that_is_killed_interrupts_the_run(self) -> None:
        executor = ProcessExecutor(1)
        results = executor.run(Calls(dies_at_three), jobs_of(6), memory_bytes=99)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InterruptedMergeError, match=r"killed by signal 9, .*--workers.*--memory"):
            next(results)
        executor.close()

    def test_work_that_cannot_be_sent_is_refused(self) -> None:
        executor = ProcessExecutor(1)
        with pytest.raises(MergeError, match=r"cannot be sent to another process \(.*use the executor threads"):
            list(executor.run(Calls(lambda value: value), jobs_of(1), memory_bytes=99))
        executor.close()

    def test_they_end_with_the_process_that_started_them(self, tmp_path: Path) -> None:
        (tmp_path / "parent.py").write_text(PARENT)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        parent = subprocess.Popen(
            [sys.executable, "parent.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())  # which sleeps now
        parent.kill()
        parent.communicate()
        for _ in range(1000):
            if not is_running(worker):
                break
            time.sleep(0.02)
        assert not is_running(worker)

    def test_a_script_that_would_start_itself_is_told_so(self, tmp_path: Path) -> None:
        (tmp_path / "script.py").write_text(UNGUARDED)
        run = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert "a worker process could not start (exit status 1)" in run.stderr
        assert "if __name__ == '__main__':" in run.stderr.splitlines()[-1]


PARENT = """
import os, time
from mergekit_lowrank.executors import Job, ProcessExecutor
from tests.test_executors import Calls, says_who_and_sleeps

if __name__ == "__main__":
    list(ProcessExecutor(1).run(Calls(says_who_and_sleeps), [Job(0, "", 1)], memory_bytes=1))
"""
UNGUARDED = """
from mergekit_lowrank.executors import Job, ProcessExecutor, Work

class Nothing(Work):
    def read(self, job): return 0
    def run(self, job, inputs): return 0

list(ProcessExecutor(1).run(Nothing(), [Job(0, "", 1)], memory_bytes=1))
"""


def says_who_and_sleeps(_: int) -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(600)


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


class OddError(Exception):
    """Cannot be pickled: it is made of two things and remembers one."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


class TestReplies:
    def test_a_result_comes_back(self) -> None:
        assert result_of(reply_of(lambda: {"a": [1, 2]})) == {"a": [1, 2]}

    def test_an_error_comes_back_with_its_causes_and_its_traceback(self) -> None:
        with pytest.raises(CheckpointError, match="an input cannot be read") as error:
            result_of(reply_of(lambda: cannot_be_read(0)))
        cause = error.value.__cause__
        assert isinstance(cause, OSError)
        assert isinstance(cause.__cause__, WorkerError)
        assert "in cannot_be_read" in str(cause.__cause__)

    @pytest.mark.parametrize("made", [lambda: OddError(1, 2), lambda: ValueError(threading.Lock())])
    def test_an_error_that_cannot_be_pickled_comes_back_as_its_text(self, made) -> None:
        def fail() -> None:
            raise made()

        with pytest.raises(RuntimeError, match=r"OddError: 1 and 2|ValueError: <unlocked"):
            result_of(reply_of(fail))

    def test_a_result_that_cannot_be_pickled_is_an_error(self) -> None:
        with pytest.raises(Exception, match="pickle"):
            result_of(reply_of(threading.Lock))
