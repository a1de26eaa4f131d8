"""``merge`` and ``finalize``: run a recipe into a directory, whole or in parts."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from mergekit_lowrank.api import finalize, merge
from mergekit_lowrank.cli.group import INTERRUPTED, TERMINATED, Stopped, Verbosity
from mergekit_lowrank.cli.request import Request
from mergekit_lowrank.cli.tables import aligned
from mergekit_lowrank.engine import format_bytes
from mergekit_lowrank.formats import partial_path
from mergekit_lowrank.recipe import bytes_of
from mergekit_lowrank.report import Report, closing_lines, pushing

__all__ = ["run_finalize", "run_merge", "stoppable"]

COLUMNS = ("variant", "method", "modules", "rank", "size", "norm", "cut error")


def run_merge(
    request: Request,
    output: Path,
    *,
    memory: str | None,
    vram: str | None,
    device: str | None,
    executor: str | None,
    workers: int | None,
    overwrite: bool,
    resume: bool,
    shard: tuple[int, int] | None,
    hash_sources: bool,
    verify: bool,
    push: str | None,
    strict: bool,
    verbosity: Verbosity,
) -> None:
    """Merge, and print what was merged, what was kept and how to load it; of a quiet merge the warnings only."""
    if push is not None:
        _check_push(push, output, shard)
    with stoppable(output):
        made = merge(
            request.load(),
            output,
            memory_bytes=bytes_of(memory),
            vram_bytes=bytes_of(vram),
            device=device,
            executor=executor,
            workers=workers,
            overwrite=overwrite,
            resume=resume,
            shard=shard,
            hash_sources=hash_sources,
            verify=verify,
            strict=strict,
            reporters=verbosity.reporters(),
        )
    _tell(made, output, verbosity, shard=shard)
    if push is not None:
        _push(output, push, quiet=verbosity.quiet)


def _check_push(repository: str, output: Path, shard: tuple[int, int] | None) -> None:
    if shard is not None:
        again = shlex.join(["hf", "upload", repository, str(output), ".", "--private"])
        raise click.UsageError(f"--push goes with a whole merge, not with a part; after finalize, run: {again}")
    pushing.check_push(repository)


def _push(output: Path, repository: str, *, quiet: bool) -> None:
    try:
        url = pushing.push(output, repository)
    except KeyboardInterrupt as error:
        raise Stopped(INTERRUPTED, f"interrupted: {output} is complete, but was not pushed") from error
    if not quiet:
        click.echo(f"  pushed       {url}")


def run_finalize(output: Path, *, overwrite: bool, verify: bool, verbosity: Verbosity) -> None:
    """Put the parts of a merge together, and print what ``run_merge`` prints of a whole one."""
    with stoppable(output):
        made = finalize(output, overwrite=overwrite, verify=verify, reporters=verbosity.reporters())
    _tell(made, output, verbosity)


def _tell(
    made: Report | Mapping[str, Report], output: Path, verbosity: Verbosity, *, shard: tuple[int, int] | None = None
) -> None:
    reports = {"": made} if isinstance(made, Report) else made
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report.warnings)
    if verbosity.quiet:
        for warning in warnings:
            verbosity.warn(warning)
    elif shard:
        click.echo("\n".join(_lines_of_shard(reports.values(), output, shard)))
    elif isinstance(made, Report):
        click.echo("\n".join(closing_lines(made, str(output))))
    else:
        click.echo("\n".join(_lines_of_sweep(made, output, warnings)))


def _lines_of_shard(reports: Iterable[Report], output: Path, shard: tuple[int, int]) -> Iterator[str]:
    index, count = shard
    seconds = max(report.totals.wall_seconds for report in reports)
    modules = sum(report.totals.modules for report in reports)
    yield f"Merged part {index}/{count} of {output}: {modules} modules in {seconds:.1f} s"
    rest = f"once all {count} parts are merged" if count > 1 else "now"
    yield f"  next  mergekit-lowrank finalize {shlex.quote(str(output))}, {rest}"


def _lines_of_sweep(reports: Mapping[str, Report], output: Path, warnings: Iterable[str]) -> Iterator[str]:
    """A line for each variant."""
    first = next(iter(reports.values()))
    yield (
        f"Merged {len(first.inputs)} inputs into {len(reports)} variants, each in its directory in {output}, in "
        f"{first.totals.wall_seconds:.1f} s"
    )
    rows = (_row_of_variant(name, report) for name, report in reports.items())
    yield from aligned(COLUMNS, rows, right=COLUMNS[2:])
    for warning in warnings:
        yield f"  warning  {warning}"


def _row_of_variant(name: str, report: Report) -> tuple[str, ...]:
    totals = report.totals
    size, norm, error = format_bytes(totals.bytes_written), totals.merged_norm, totals.largest_cut_error
    return name, report.method, str(totals.modules), report.rank_text, size, f"{norm:.3g}", f"{error:.2g}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be."""


@contextmanager
def stoppable(output: Path) -> Iterator[None]:
    """Within it SIGTERM ends the command as Ctrl-C does. Either then says whether the work so far is kept."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        is_kept = partial_path(output.resolve()).exists()
        left = "the work so far is kept; run the same command again to go on" if is_kept else "nothing was written"
        if isinstance(error, _Terminated):
            raise Stopped(TERMINATED, f"terminated: {left}") from error
        raise Stopped(INTERRUPTED, f"interrupted: {left}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    signal.signal(number, signal.SIG_IGN)  # what is sent twice must not stop the tidying up
    raise _Terminated
