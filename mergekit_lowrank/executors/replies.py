"""What a job in another process gives, or the error that it raises, as bytes."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["WorkerError", "reply_of", "result_of"]


class WorkerError(Exception):
    """The first cause of an error of another process: its traceback there."""


@dataclass(frozen=True)
class _Failure:
    """An error and what it was raised from, which pickling the error alone would lose."""

    chain: tuple[BaseException, ...]

    def error(self) -> BaseException:
        for error, cause in zip(self.chain, self.chain[1:], strict=False):
            error.__cause__ = cause
        return self.chain[0]


def reply_of(call: Callable[[], Any]) -> bytes:
    """What ``call`` returns or raises, for ``result_of`` in another process."""
    try:
        return pickle.dumps(call())
    except Exception as error:
        return pickle.dumps(_Failure(tuple(_chain(error))))


def result_of(reply: bytes) -> Any:
    """What the call returned. What it raised is raised here, with its causes; the first one is a ``WorkerError``."""
    found = pickle.loads(reply)  # noqa: S301 - from a process of this merge
    if isinstance(found, _Failure):
        raise found.error()
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    told = "".join(traceback.format_exception(error))
    cause: BaseException | None = error
    while cause is not None:
        yield _portable(cause)
        cause = cause.__cause__
    yield WorkerError(f"\n{told}")


def _portable(error: BaseException) -> BaseException:
    """The error, or its text where it cannot be pickled."""
    try:
        found = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return found if type(found) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
