"""How the modules of a merge are scheduled: one after the other, or several at once within a memory budget."""

from mergekit_lowrank.executors.base import (
    Executor,
    Inputs,
    Job,
    Ledger,
    Result,
    Work,
    available_processors,
    intra_op_threads,
)
from mergekit_lowrank.executors.processes import ProcessExecutor
from mergekit_lowrank.executors.replies import WorkerError, reply_of, result_of
from mergekit_lowrank.executors.threads import SerialExecutor, ThreadExecutor

__all__ = [
    "Executor",
    "Inputs",
    "Job",
    "Ledger",
    "ProcessExecutor",
    "Result",
    "SerialExecutor",
    "ThreadExecutor",
    "Work",
    "WorkerError",
    "available_processors",
    "intra_op_threads",
    "reply_of",
    "result_of",
]
