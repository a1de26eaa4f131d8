"""What a merge has finished so far, a line for each module, so that another process can go on from there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lowrank.errors import DiskError
from mergekit_lowrank.formats import writing

__all__ = ["Journal", "read_lines"]


class Journal:
    """An append-only file of JSON objects, each on a line of its own behind its checksum.

    The first tells what is being merged. A line that a crash cut short, and all after it, count as not written.

    Args:
        path: of the file; made with its first line where it is missing or ``begins`` otherwise.
        begins: what is being merged. Objects of another merge are dropped.

    Attributes:
        path: of the file.
        lines: the objects found, the first one apart.

    Raises:
        DiskError: the disk is full or failed.
    """

    def __init__(self, path: Path, begins: Mapping[str, Any]) -> None:
        found = list(read_lines(path))
        plain = json.loads(json.dumps(begins))
        self.lines = found[1:] if found[:1] == [plain] else []
        self.path, self._lock, self._is_dropped = path, threading.Lock(), False
        # Rewritten, so that nothing is appended to half a line.
        fresh = path.with_name(f"{path.name}.new")
        with writing(path):
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(_line(entry) for entry in (plain, *self.lines))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one object; from any thread.

        Raises:
            DiskError: the disk is full or failed.
        """
        with self._lock, writing(self.path):
            if self._is_dropped:
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))

    def drop(self) -> None:
        """Delete the file, and keep nothing of what is appended later.

        Raises:
            DiskError: the disk failed.
        """
        with self._lock, writing(self.path):
            self._is_dropped = True
            self.path.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a journal, up to the first line that is not whole; none where there is no such file.

    Raises:
        DiskError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}.") from error
    for line in lines:
        checksum, _, text = line.partition(" ")
        if not line.endswith("\n") or checksum != xxh3_64_hexdigest(text.removesuffix("\n").encode()):
            return
        yield json.loads(text)


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, separators=(",", ":"))
    return f"{xxh3_64_hexdigest(text.encode())} {text}\n"
