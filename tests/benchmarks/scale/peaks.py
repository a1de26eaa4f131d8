"""What one merge holds at most, measured in an interpreter of its own.

    python -m tests.benchmarks.scale.peaks '[RECIPE, OUTPUT, OPTIONS, FLUSHES]'

merges once and prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

SAMPLE_SECONDS = 0.001
ROOT = Path(__file__).resolve().parents[3]


def status_bytes(field: str, process: int | str = "self") -> int:
    """One of the sizes in the status of a process: RssAnon now, VmHWM at most so far; 0 where the process is gone."""
    try:
        with Path(f"/proc/{process}/status").open() as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0


def workers() -> list[int]:
    """Processes that this one started and that work for it."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in found if "resource_tracker" not in _command(child)]


def _command(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return "resource_tracker"


class Watch:
    """The most anonymous memory of this process and its workers, each beyond what this one had at the start.

    Attributes:
        peak_bytes: so far.
        samples: how many were taken.
    """

    def __init__(self) -> None:
        self._before = status_bytes("RssAnon")
        self.peak_bytes = self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The last sample is taken."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            held = [status_bytes("RssAnon", process) - self._before for process in ("self", *workers())]
            self.peak_bytes = max(self.peak_bytes, sum(max(0, own) for own in held))
            self.samples += 1


def merged(recipe: Mapping[str, Any], output: str, options: Mapping[str, Any], flushes: bool) -> Figures:
    """Merge here and now, and tell what that took.

    ``resident_bytes`` is the growth of the largest resident set, the pages of mapped files among it. ``flushes`` says
    whether the disk is waited for.
    """
    from mergekit_lowrank import api

    resident = status_bytes("VmHWM")
    watch, start, cpu = Watch(), time.perf_counter(), time.process_time()
    api.merge(recipe, output, **options)
    if flushes:
        os.sync()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    watch.stop()
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_bytes": watch.peak_bytes,
        "resident_bytes": status_bytes("VmHWM") - resident,
        "samples": watch.samples,
    }


def in_interpreter(recipe: Mapping[str, Any], output: str | Path, *, flushes: bool = False, **options: Any) -> Figures:
    """The same in an interpreter of its own, whose allocator is as it comes.

    Raises:
        SystemExit: the merge failed there.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.scale.peaks", json.dumps([recipe, str(output), options, flushes])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Figures = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str]) -> None:
    """Merge once, and print the figures."""
    sys.stdout.write(json.dumps(merged(*json.loads(arguments[0]))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
