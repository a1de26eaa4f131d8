"""``merge``: run a recipe into a directory."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lowrank.api import merge
from mergekit_lowrank.cli.progress import ProgressBar
from mergekit_lowrank.cli.request import Request
from mergekit_lowrank.recipe import parse_bytes
from mergekit_lowrank.report import closing_lines

__all__ = ["run_merge"]


def run_merge(
    request: Request,
    output: Path,
    *,
    memory: str | None,
    device: str,
    executor: str,
    overwrite: bool,
    hash_sources: bool,
    strict: bool,
    quiet: bool,
) -> None:
    """Merge, and print what was merged, what was kept and how to load it; of a quiet merge the warnings only."""
    report = merge(
        request.load(),
        output,
        memory_bytes=parse_bytes(memory) if memory else None,
        device=device,
        executor=executor,
        overwrite=overwrite,
        hash_sources=hash_sources,
        strict=strict,
        reporters=[] if quiet else [ProgressBar()],
    )
    if quiet:
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)
    else:
        click.echo("\n".join(closing_lines(report, str(output))))
