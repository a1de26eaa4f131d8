"""Progress bars and notices on stderr."""

from __future__ import annotations

from typing import ClassVar, NoReturn

import click
from tqdm import tqdm

from mergekit_lowrank.events import Event, MergeStarted, ModuleMerged, Notice, Reporter, SurveyRound

__all__ = ["ProgressBar"]


class ProgressBar(Reporter):
    """One bar for each survey round, then one for the merge. They vanish at the end; off a terminal there are none.

    Notices are lines of their own, on a terminal or not.
    """

    name: ClassVar[str] = "progress"
    summary: ClassVar[str] = "progress bars and notices on stderr"

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._title = ""
        self._modules = 0

    def handle(self, event: Event) -> None:
        """Advance the bar that the event belongs to."""
        match event:
            case MergeStarted():
                self._modules = event.modules
                self._show("merge", event.modules)
            case Notice():
                self.close()
                click.echo(event.message, err=True)
            case SurveyRound():
                self._show(f"survey, round {event.round}", event.modules).update()
            case ModuleMerged():
                self._show("merge", self._modules).update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _show(self, title: str, modules: int) -> tqdm[NoReturn]:
        if self._bar is not None and self._title == title:
            return self._bar
        self.close()
        self._title = title
        bar: tqdm[NoReturn] = tqdm(total=modules, desc=title, unit="module", leave=False, disable=None)
        self._bar = bar
        return bar
