"""Merges killed by SIGKILL at random moments, each gone on with: the bytes must be those of a merge left alone.

Every second merge replaces an older output, which must be there untouched after the kill.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any

from mergekit_lowrank import merge
from mergekit_lowrank.engine.journal import read_lines
from tests.end_to_end.unfinished import files, partial_of


@dataclass(frozen=True)
class Kill:
    """One merge that was killed and gone on with.

    Attributes:
        seconds: from its start to the kill.
        finished: modules that its journal told of; None where nothing was left of it.
        is_complete: whether the output was in place already.
        replaced: whether there was an older output.
        resumed_seconds: of the merge that went on.
        is_same: whether the output has the bytes of a merge that was left alone.
    """

    seconds: float
    finished: int | None
    is_complete: bool
    replaced: bool
    resumed_seconds: float
    is_same: bool


class Killer:
    """Kills merges of one recipe in processes of their own, which start with everything imported.

    Args:
        recipe: what to merge.
        root: an empty directory to do it in.
        seed: of the moments.
        executor: how modules are scheduled.
    """

    def __init__(self, recipe: Any, root: Path, *, seed: int = 0, executor: str = "threads") -> None:
        self._recipe, self._out, self._executor = recipe, root / "out", executor
        self._random = random.Random(seed)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([__name__])
        self._whole()  # starts the server
        self._seconds = self._whole()
        self._expected = files(self._out)
        self._clear()

    @property
    def whole_seconds(self) -> float:
        """Of a merge that is left alone, as measured beforehand."""
        return self._seconds

    def kills(self, count: int) -> Iterator[Kill]:
        """So many kills at moments between the start and the end of a merge; those that came too late do not count."""
        made = 0
        while made < count:
            found = self._kill(self._random.uniform(0, self._seconds), replaces=made % 2 == 1)
            self._clear()
            if found is not None:
                made += 1
                yield found

    def _kill(self, seconds: float, *, replaces: bool) -> Kill | None:
        if replaces:
            self._make_old()
        process = self._started(overwrite=replaces)
        time.sleep(seconds)
        process.kill()
        process.join()
        if process.exitcode != -SIGKILL:
            return None
        finished, is_complete = self._finished(), self._has_expected()
        self._check_old(replaces, is_complete)
        resumed = 0.0 if is_complete else self._whole(overwrite=replaces)
        return Kill(seconds, finished, is_complete, replaces, resumed, self._has_expected())

    def _whole(self, *, overwrite: bool = True) -> float:
        start = time.perf_counter()
        process = self._started(overwrite=overwrite)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a merge that was not killed ended with status {process.exitcode}")
        return time.perf_counter() - start

    def _started(self, *, overwrite: bool) -> BaseProcess:
        process = self._processes.Process(target=_merge, args=(self._recipe, self._out, overwrite, self._executor))
        process.start()
        return process

    def _finished(self) -> int | None:
        if not partial_of(self._out).exists():
            return None
        journals = partial_of(self._out).rglob("journal*.jsonl")
        return sum("receipt" in line for journal in journals for line in read_lines(journal))

    def _has_expected(self) -> bool:
        return self._out.exists() and files(self._out) == self._expected

    def _make_old(self) -> None:
        self._out.mkdir()
        (self._out / "adapter_config.json").write_text("{}")

    def _check_old(self, replaces: bool, is_complete: bool) -> None:
        """The output is the old one, or the new one; between its two renames the old one stands beside it."""
        aside = self._out.with_name(f".{self._out.name}.replaced")
        is_old = any(path.exists() and files(path) == {"adapter_config.json": b"{}"} for path in (self._out, aside))
        if not is_complete and is_old != replaces:
            raise RuntimeError(f"the kill left {sorted(path.name for path in self._out.parent.iterdir())}")

    def _clear(self) -> None:
        for path in self._out.parent.glob(f"*{self._out.name}*"):
            shutil.rmtree(path)


def _merge(recipe: Any, out: Path, overwrite: bool, executor: str) -> None:
    merge(recipe, out, overwrite=overwrite, executor=executor)
