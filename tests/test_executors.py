"""Executors run every job, within the memory promised, and stop at the first failure."""

import threading
import time

import pytest
import torch

from mergekit_lowrank.executors import Job, SerialExecutor, ThreadExecutor, intra_op_threads


def jobs_of(count, size=1, work=lambda value: value):
    return [Job(str(i), size, lambda i=i: i, work) for i in range(count)]


@pytest.mark.parametrize("executor", [SerialExecutor(), ThreadExecutor(1), ThreadExecutor(3)])
def test_every_job_gives_its_result_once(executor) -> None:
    results = executor.run(jobs_of(25, work=lambda value: value * 2), memory_bytes=100)
    assert sorted(results) == [2 * i for i in range(25)]


def test_jobs_in_flight_stay_within_the_memory_promised() -> None:
    lock, in_flight, highest = threading.Lock(), 0, 0

    def read():
        nonlocal in_flight, highest
        with lock:
            in_flight += 1
            highest = max(highest, in_flight)

    def work(_):
        nonlocal in_flight
        time.sleep(0.002)
        with lock:
            in_flight -= 1

    jobs = [Job(str(i), 10, read, work) for i in range(20)]
    list(ThreadExecutor(4).run(jobs, memory_bytes=25))
    assert highest <= 2


def test_a_job_larger_than_the_memory_still_runs_alone() -> None:
    assert list(ThreadExecutor(2).run(jobs_of(3, size=1000), memory_bytes=1)) == [0, 1, 2]


@pytest.mark.parametrize("executor", [SerialExecutor(), ThreadExecutor(2)])
def test_the_first_failure_is_raised_and_stops_the_run(executor) -> None:
    started = []

    def work(value):
        started.append(value)
        if value == 1:
            raise ValueError("job 1 failed")
        return value

    with pytest.raises(ValueError, match="job 1 failed"):
        list(executor.run(jobs_of(200, work=work), memory_bytes=10**9))
    assert len(started) < 200


def test_a_failing_read_is_raised_too() -> None:
    def read():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(ThreadExecutor(2).run([Job("a", 1, read, lambda value: value)], memory_bytes=10))


@pytest.mark.parametrize("executor", [SerialExecutor(), ThreadExecutor(2)])
def test_work_runs_with_one_thread_inside_an_operation(executor) -> None:
    before = torch.get_num_threads()
    counts = list(executor.run(jobs_of(6, work=lambda _: torch.get_num_threads()), memory_bytes=10))
    assert counts == [1] * 6
    assert torch.get_num_threads() == before


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), intra_op_threads(1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
