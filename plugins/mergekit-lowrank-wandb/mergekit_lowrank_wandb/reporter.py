"""One run for each merge: what was merged, the measures of each module, the totals and the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from mergekit_lowrank import Event, MergeFinished, MergeStarted, ModuleMerged, Reporter
from mergekit_lowrank.events import MergeFailed

__all__ = ["PROJECT_VARIABLE", "WandbReporter"]

PROJECT_VARIABLE = "MERGEKIT_LOWRANK_WANDB_PROJECT"
"""Environment variable: the project that runs go to. Without it this plugin does nothing, and wandb is not imported."""

REPORTS = ("report.json", "report.html")
"""Files of an output that are kept as an artifact."""


class WandbReporter(Reporter):
    """Sends a merge to Weights & Biases where ``MERGEKIT_LOWRANK_WANDB_PROJECT`` names a project.

    Where and how runs are kept is up to wandb's own variables, such as ``WANDB_MODE=offline``. A run that the program
    has open is left alone.
    """

    name: ClassVar[str] = "wandb"
    summary: ClassVar[str] = f"runs of Weights & Biases, where {PROJECT_VARIABLE} names a project"

    def __init__(self) -> None:
        self._project = os.environ.get(PROJECT_VARIABLE, "")
        self._run: Any = None
        self._modules = 0
        self._exit_code = 1

    def handle(self, event: Event) -> None:
        """Log the event, if runs are wanted."""
        if not self._project:
            return
        match event:
            case MergeStarted():
                self._begin(_config(event))
            case ModuleMerged():
                self._modules += 1
                self._run.log(_measures(event), step=self._modules)
            case MergeFinished():
                self._finish(event)
            case MergeFailed():
                self._begin({})
                self._run.summary["error"] = event.message

    def close(self) -> None:
        """End the run; as a failed one unless the merge finished."""
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)
        self._run = None

    def _begin(self, config: Mapping[str, Any]) -> None:
        """A run, unless there is one: what is put together from parts never started here."""
        if self._run is None:
            wandb = import_module("wandb")  # takes seconds, and is not needed where nothing is sent
            settings = wandb.Settings(console="off", reinit="create_new")
            self._run = wandb.init(project=self._project, job_type="merge", config=dict(config), settings=settings)

    def _finish(self, event: MergeFinished) -> None:
        self._begin({})
        self._run.summary.update({**_flat(event.totals), "seconds": event.wall_seconds, "warnings": [*event.warnings]})
        files = [] if event.location is None else [*_reports(Path(event.location))]
        if files:
            artifact = import_module("wandb").Artifact("merge-report", "report", metadata={"location": event.location})
            for name, path in files:
                artifact.add_file(str(path), name=name)
            self._run.log_artifact(artifact)
        self._exit_code = 0


def _config(event: MergeStarted) -> dict[str, Any]:
    """What the run is searched by."""
    told = {"method": event.method, "inputs": [*event.inputs], "modules": event.modules, "bytes_read": event.bytes_read}
    return {**told, "recipe": dict(event.recipe)}


def _measures(event: ModuleMerged) -> dict[str, Any]:
    """What is known of one module, under names of its own: the summary shows the last values beside the totals."""
    known = {"name": event.module, "rank": event.rank, "wall_seconds": event.wall_seconds, **event.measures}
    prefix = f"{event.variant}/module" if event.variant else "module"
    return {f"{prefix}/{name}": value for name, value in known.items() if value is not None}


def _flat(totals: Mapping[str, Any]) -> dict[str, Any]:
    """The totals, of a sweep ``variant/name`` for each."""
    found: dict[str, Any] = {}
    for name, value in totals.items():
        found |= {f"{name}/{own}": v for own, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return {name: value for name, value in found.items() if value is not None}


def _reports(location: Path) -> Iterator[tuple[str, Path]]:
    """Names and places of the reports in an output: of one merge, or of each variant of a sweep."""
    for pattern in (name for report in REPORTS for name in (report, f"*/{report}")):
        for path in sorted(location.glob(pattern)):
            yield path.relative_to(location).as_posix(), path
