"""``--log-json``: what a command does, for programs: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, ClassVar

from mergekit_lowrank.events import Event, Reporter

__all__ = ["JsonLog", "open_log"]

STDERR = "-"
"""What is given for a file to name stderr."""


class JsonLog(Reporter):
    """Writes each event when it comes: the time in UTC, the name of the event, and its fields.

    The last line tells how the command ended: ``CommandEnded`` with ``exit_status``, and of a failure its ``message``.

    Args:
        descriptor: of an open file; None for stderr.
    """

    name: ClassVar[str] = "log-json"
    summary: ClassVar[str] = "events as lines of JSON"

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self.is_stderr = descriptor is None

    def handle(self, event: Event) -> None:
        """Write the event."""
        self._write(event.to_dict())

    def end(self, status: int, message: str, trace: str) -> None:
        """Write how the command ended, as far as that is possible, and let the file go.

        Args:
            status: its exit status.
            message: of a failure; empty for none.
            trace: of the error; empty where it is not to be shown.
        """
        told = {name: text for name, text in (("message", message), ("traceback", trace)) if text}
        with suppress(OSError):  # the reporter has failed before, and the report says so
            self._write({"event": "CommandEnded", "exit_status": status, **told})
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)

    def _write(self, fields: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **_finite(fields)}) + "\n"
        if self._descriptor is None:
            sys.stderr.write(line)
            sys.stderr.flush()
        else:
            os.write(self._descriptor, line.encode())  # at once, and in one piece


def _finite(data: Any) -> Any:
    """Plain data with None for numbers that JSON lacks."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def open_log(target: str) -> JsonLog:
    """A log that goes on at the end of a file, or on stderr.

    Args:
        target: the file, or ``-``.

    Raises:
        OSError: it cannot be written.
    """
    if target != STDERR:
        return JsonLog(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
    if sys.stderr is None:
        raise OSError("this process has no stderr")
    return JsonLog(None)
