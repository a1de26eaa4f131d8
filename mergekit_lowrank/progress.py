"""Progress on stderr, in the form that suits what reads it: a terminal, a notebook, or a log."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from time import monotonic
from typing import Any, ClassVar, Protocol

from tqdm import TqdmWarning, tqdm

from mergekit_lowrank.events import Event, MergeResumed, MergeStarted, ModuleMerged, Notice, Reporter, SurveyRound

__all__ = ["ProgressBar"]

SILENT_SECONDS = 5.0
"""What takes less writes no line into a log."""
LINE_SECONDS = 30.0
"""After so long a line is due, however little was done since the last one."""
LINE_SHARE = 0.1
"""Of all modules: with so many more done a line is due."""


class ProgressBar(Reporter):
    """One bar for each survey round, then one for the merge; a bar vanishes at its end.

    Where stderr is no terminal and no notebook there are lines instead: none in the first five seconds, then one for
    every tenth of the modules, or every half minute. Notices are lines of their own everywhere.
    """

    name: ClassVar[str] = "progress"
    summary: ClassVar[str] = "progress bars and notices on stderr"

    def __init__(self) -> None:
        self._bar: _Bar | None = None
        self._title = ""
        self._modules = 0

    def handle(self, event: Event) -> None:
        """Advance the bar that the event belongs to."""
        match event:
            case MergeStarted():
                self._modules = event.modules
                self._show("merge", event.modules)
            case MergeResumed():
                self.close()
                self._show("merge", self._modules, event.finished)
            case Notice():
                with tqdm.external_write_mode(sys.stderr):
                    _write(event.message)
            case SurveyRound():
                title = f"{event.stage}, round {event.round}"
                if self._is_shown(title):
                    self._show(title, event.modules).update()
                else:  # told when its first module is done: the time counts from there, and so does what is left
                    self._show(title, event.modules, 1)
            case ModuleMerged():
                self._show("merge", self._modules).update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _is_shown(self, title: str) -> bool:
        return self._bar is not None and self._title == title

    def _show(self, title: str, modules: int, finished: int = 0) -> _Bar:
        if self._bar is None or not self._is_shown(title):
            self.close()
            self._title, self._bar = title, _bar_of(title, modules, finished)
        return self._bar


class _Bar(Protocol):
    """What a stage advances, module by module."""

    def update(self) -> object: ...

    def close(self) -> object: ...


class _Lines:
    """Lines for a log, few of them."""

    def __init__(self, title: str, modules: int, finished: int) -> None:
        self._title, self._modules = title, modules
        self._first = self._done = self._told = finished
        self._start = self._last = monotonic()

    def update(self) -> None:
        """One more is done; perhaps a line."""
        self._done, now = self._done + 1, monotonic()
        is_due = now - self._last >= LINE_SECONDS or self._done - self._told >= LINE_SHARE * self._modules
        if is_due and now - self._start >= SILENT_SECONDS:
            self._told, self._last = self._done, now
            _write(self._line(now - self._start))

    def close(self) -> None:
        """There is nothing to take away."""

    def _line(self, seconds: float) -> str:
        left = (self._modules - self._done) * seconds / (self._done - self._first)
        spent, more = tqdm.format_interval(seconds), tqdm.format_interval(left)
        share = f"{100 * self._done / self._modules:.0f} %"
        return f"{self._title}: {self._done} of {self._modules} modules ({share}) in {spent}, about {more} left"


def _bar_of(title: str, modules: int, finished: int) -> _Bar:
    if _is_notebook():
        kind = _notebook_bar()
    elif sys.stderr is not None and sys.stderr.isatty():
        kind = tqdm
    else:
        return _Lines(title, modules, finished)
    bar: _Bar = kind(total=modules, initial=finished, desc=title, unit="module", leave=False)
    return bar


def _is_notebook() -> bool:
    """Whether this is a Jupyter kernel, as tqdm asks; a terminal of IPython is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _notebook_bar() -> Any:
    """A widget; without ipywidgets a bar of text, of which tqdm would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)
        return import_module("tqdm.auto").tqdm


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
