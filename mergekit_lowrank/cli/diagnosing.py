"""``diagnose``: how the inputs of a recipe stand to each other, as tables and findings."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click

from mergekit_lowrank.cli.request import Request
from mergekit_lowrank.cli.tables import aligned, fields, one_line, spans
from mergekit_lowrank.diagnostics import Diagnosis, ModuleDiagnosis, diagnose
from mergekit_lowrank.diagnostics.diagnosis import Matrix
from mergekit_lowrank.diagnostics.wording import percent
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.formats import write_text
from mergekit_lowrank.inspection.headers import span
from mergekit_lowrank.lowrank import independent_conflict
from mergekit_lowrank.recipe import bytes_of
from mergekit_lowrank.report.grid import layer_and_kind

__all__ = ["run_diagnose"]

UNKNOWN = "-"
COLUMNS_OF_TEXT = 100
"""Of findings."""
INPUT_COLUMNS = ("input", "weight", "norm", "share", "stable rank", "effective rank", "gap", "head", "tail")
COLUMNS = (
    "modules",
    "layers",
    "count",
    "out x in",
    "rank",
    "cosine",
    "rows",
    "columns",
    "signs",
    "head",
    "tail",
    "kept",
)
LEGEND = (
    "norm: of scaling * B * A; share: of the energy, times weights; gap: largest over smallest singular value",
    "head, tail: cosine of an input's strong and weak singular directions with what this merge turns them to",
    "cosine: of two updates, least and greatest; rows, columns: overlap of their spaces, 0 to 1, the mean of all pairs",
    "signs: share of entries whose signs differ, 0.5 of unrelated updates; kept: energy of the sum at the output rank",
)


def run_diagnose(
    request: Request,
    *,
    memory: str | None,
    device: str | None,
    executor: str | None,
    workers: int | None,
    strict: bool,
    as_json: bool,
    html: str | None,
    reporters: Sequence[Reporter],
) -> None:
    """Diagnose, and print the tables or the JSON; with ``html`` write the page too."""
    if html is not None:
        _check_place(Path(html))
    found = diagnose(
        request.load(),
        memory_bytes=bytes_of(memory),
        device=device,
        executor=executor,
        workers=workers,
        strict=strict,
        reporters=reporters,
    )
    click.echo(found.to_json() if as_json else "\n".join(_lines(found)), nl=not as_json)
    if html is not None:
        from mergekit_lowrank.diagnostics.page import diagnosis_page

        write_text(Path(html), diagnosis_page(found))
        click.echo(f"wrote {html}", err=True)


def _check_place(page: Path) -> None:
    """Raise what would only be found when all is measured."""
    if page.is_dir():
        raise OutputError(f"{page}: is a directory; name the file to write the page into")
    if not page.parent.is_dir():
        raise OutputError(f"{page}: its directory does not exist; make it first, or name another file")


def _lines(found: Diagnosis) -> Iterator[str]:
    yield from aligned(INPUT_COLUMNS, _rows_of_inputs(found), right=INPUT_COLUMNS[1:])
    yield ""
    yield from aligned(COLUMNS, map(_row, _alike(found.modules)), right=COLUMNS[2:])
    if len(found.inputs) > 1:
        yield ""
        yield from _pairs(found)
    yield ""
    yield from LEGEND
    yield ""
    yield from fields(_facts(found))
    yield ""
    for finding in found.findings:
        lines = [*_wrapped(finding.message), *_wrapped(finding.advice)]
        yield from fields(zip([finding.severity, *[""] * len(lines)], lines, strict=False))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(one_line(text), COLUMNS_OF_TEXT, break_long_words=False, break_on_hyphens=False)


def _rows_of_inputs(found: Diagnosis) -> Iterator[tuple[str, ...]]:
    for number, own in enumerate(found.inputs, 1):
        yield (
            f"{number} {own.label}",
            span(own.weights, "g"),
            f"{own.norm:.4g}",
            UNKNOWN if own.share is None else percent(own.share),
            _number(own.stable_rank, ".3g"),
            _number(own.effective_rank, ".3g"),
            _number(own.gap, ".3g"),
            _number(own.robustness_head, ".2f"),
            _number(own.robustness_tail, ".2f"),
        )


def _alike(modules: Iterable[ModuleDiagnosis]) -> Iterable[list[ModuleDiagnosis]]:
    """Modules that differ in their layer only, together."""
    groups: dict[object, list[ModuleDiagnosis]] = {}
    for module in modules:
        groups.setdefault((layer_and_kind(module.module)[1], module.d_out, module.d_in), []).append(module)
    return groups.values()


def _row(modules: Sequence[ModuleDiagnosis]) -> tuple[str, ...]:
    """The cells of modules that are alike: means over layers and pairs, of cosines and ranks the extremes."""
    layers = [layer for layer, _ in (layer_and_kind(module.module) for module in modules) if layer is not None]
    ranks = [rank for module in modules for rank in module.ranks if rank is not None]
    cosines = [value for module in modules for value in _of_pairs(module.cosines)]

    def mean(values: Callable[[ModuleDiagnosis], Iterable[float | None]]) -> str:
        known = [value for module in modules for value in values(module) if value is not None]
        return _number(statistics.fmean(known) if known else None, ".2f")

    return (
        layer_and_kind(modules[0].module)[1],
        spans(layers) or UNKNOWN,
        str(len(modules)),
        f"{modules[0].d_out} x {modules[0].d_in}",
        span(ranks, "d") if ranks else UNKNOWN,
        f"{min(cosines):+.2f} to {max(cosines):+.2f}" if cosines else UNKNOWN,
        mean(lambda module: _of_pairs(module.row_overlaps)),
        mean(lambda module: _of_pairs(module.column_overlaps)),
        mean(lambda module: _of_pairs(module.sign_conflicts)),
        mean(lambda module: module.robustness_head),
        mean(lambda module: module.robustness_tail),
        mean(lambda module: [module.sum_kept_energy]),
    )


def _of_pairs(table: Matrix) -> list[float]:
    """What is known of two different inputs, each pair once."""
    return [value for s, row in enumerate(table) for value in row[:s] if value is not None]


def _pairs(found: Diagnosis) -> Iterator[str]:
    """Cosines, and the overlaps of row spaces (below the diagonal) and of column spaces (above it)."""
    rows, columns = found.pairs.row_overlaps, found.pairs.column_overlaps
    count = len(found.inputs)
    overlaps = [[(rows if t < s else columns)[s][t] for t in range(count)] for s in range(count)]
    numbers = [str(number) for number in range(1, count + 1)]
    for title, table in (("cosine", found.pairs.cosines), ("rows \\ columns", overlaps)):
        header = (title, *(number.rjust(5) for number in numbers))
        cells = [
            (f"{numbers[s]} {own.label}", *("" if s == t else _number(table[s][t], ".2f") for t in range(count)))
            for s, own in enumerate(found.inputs)
        ]
        yield from aligned(header, cells, right=header[1:])


def _facts(found: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "method", f"{found.method} in {', '.join(found.spaces)}"
    if found.sign_conflict is not None:
        how = "4,096 entries of large modules" if found.sampled else "all entries"
        yield "signs", f"{percent(found.sign_conflict, 1)} of all that is added is against the sign that wins ({how})"
        chance = independent_conflict([own.weighted_norm for own in found.inputs])
        if chance is not None:
            yield "", f"independent inputs of these sizes would have {percent(chance, 1)}"
    if found.core_overlap is not None:
        rows, columns = found.core_overlap
        yield "core overlap", f"{rows:.2f} of rows, {columns:.2f} of columns (subspace alignment ratio)"
    for warning in found.warnings:
        yield "warning", warning


def _number(value: float | None, form: str) -> str:
    if value is None:
        return UNKNOWN
    text = f"{value:{form}}"
    return text if float(text) else text.removeprefix("-")
