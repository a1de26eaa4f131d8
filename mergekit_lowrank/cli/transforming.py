"""``convert``, ``resize`` and ``extract``: one adapter made into another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mergekit_lowrank.cli.merging import stoppable
from mergekit_lowrank.cli.tables import aligned, fields
from mergekit_lowrank.engine import format_bytes
from mergekit_lowrank.inspection.headers import counted, span
from mergekit_lowrank.progress import ProgressBar
from mergekit_lowrank.recipe import bytes_of
from mergekit_lowrank.report import Report
from mergekit_lowrank.transforms import ConversionReport, convert, extract, resize

__all__ = ["run_convert", "run_extract", "run_resize"]

COLUMNS = ("modules", "count", "rank", "energy kept", "error")


def run_convert(
    adapter: str, output: Path, *, format_name: str, base: str | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Convert, and print what came back when the result was read."""
    report = convert(adapter, output, format=format_name, base=base, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    elif not quiet:
        click.echo("\n".join(_lines_of_conversion(report)))


def run_resize(
    adapter: str, output: Path, *, rank: str, base: str | None, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Resize, and print what each module kept."""
    with stoppable(output):
        report = resize(adapter, output, rank=rank, base=base, **_options(quiet=quiet, **settings))
    _tell(f"Resized {adapter} to {report.rank_text}", report, as_json=as_json, quiet=quiet)


def run_extract(
    finetuned: str,
    output: Path,
    *,
    rank: str,
    base: str,
    extras: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Extract, and print what each module kept."""
    with stoppable(output):
        report = extract(finetuned, output, base=base, rank=rank, extras=extras, **_options(quiet=quiet, **settings))
    _tell(f"Extracted {report.rank_text} from {finetuned}", report, as_json=as_json, quiet=quiet)


def _options(*, memory: str | None, uniform_rank: bool, overwrite: bool, quiet: bool) -> dict[str, Any]:
    return {
        "memory_bytes": bytes_of(memory),
        "uniform_rank": uniform_rank,
        "overwrite": overwrite,
        "reporters": [] if quiet else [ProgressBar()],
    }


def _lines_of_conversion(report: ConversionReport) -> Iterator[str]:
    size = f", {format_bytes(report.stored_bytes)}" if report.is_read_back else ""
    modules = counted(report.modules, "module")
    yield f"Converted {report.source} ({report.source_format}) to {report.format}: {modules}{size}"
    yield from fields(_facts(report), indent="  ")


def _facts(report: ConversionReport) -> Iterator[tuple[str, str]]:
    yield "files", ", ".join(report.files)
    if not report.is_read_back:
        yield "read back", f"no: nothing that is installed reads {report.format}, so nothing was compared"
        return
    yield "tensors", f"all {report.tensors} came back bit for bit"
    change = report.largest_scaling_change
    yield "scaling", f"came back to {change:.1g} of itself" if change else "came back exactly"
    if report.renamed:
        before, after = next(iter(report.renamed.items()))
        more = f", and {len(report.renamed) - 1} more" if len(report.renamed) > 1 else ""
        yield "names", f"'{before}' came back as '{after}'{more}"
    if report.not_kept:
        yield "not kept", ", ".join(report.not_kept)


def _tell(first: str, report: Report, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps(_as_dict(report), indent=1))
    elif quiet:
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)
    else:
        click.echo("\n".join(_lines_of_cut(first, report)))


def _lines_of_cut(first: str, report: Report) -> Iterator[str]:
    totals = report.totals
    yield f"{first}: {counted(totals.modules, 'module')}, {report.dtype}, {format_bytes(totals.bytes_written)}"
    yield ""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for module in report.modules:
        groups.setdefault(re.split(r"\.\d+\.", module["module"])[-1], []).append(module)
    yield from aligned(COLUMNS, (_row(name, own) for name, own in groups.items()), right=COLUMNS[1:])
    yield ""
    yield "error: ‖ΔW − ΔW_rank‖ / ‖ΔW‖, over the modules of a row; each module's is in report.json"
    yield from _padding(report)
    for warning in report.warnings:
        yield f"warning: {warning}"


def _padding(report: Report) -> Iterator[str]:
    padded = sum(own["rank"] is not None and own["rank"] < own["written_rank"] for own in report.modules)
    if padded:
        verb = "is" if padded == 1 else "are"
        yield f"rank: of the update; {counted(padded, 'module')} {verb} padded with zeros to rank {report.rank}"


def _row(name: str, modules: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    ranks = [module["rank"] for module in modules if module["rank"] is not None]
    return (
        name,
        str(len(modules)),
        span(ranks) if ranks else "whole",
        span((100 * module["kept_energy"] for module in modules), ".4g") + " %",
        span((module["cut_error"] for module in modules), ".3g"),
    )


def _as_dict(report: Report) -> dict[str, Any]:
    names: Iterable[str] = ("module", "rank", "written_rank", "energy", "kept_energy", "cut_error")
    totals = report.totals
    return {
        "rank": report.rank,
        "dtype": report.dtype,
        "bytes_written": totals.bytes_written,
        "kept_energy": totals.kept_energy,
        "largest_error": totals.largest_cut_error,
        "warnings": list(report.warnings),
        "modules": [{name: module[name] for name in names} for module in report.modules],
    }
