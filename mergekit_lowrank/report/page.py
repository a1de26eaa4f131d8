"""``report.html``: what a merge did, to look at. One file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from markupsafe import Markup

from mergekit_lowrank.engine import format_bytes
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.pages import Figure, Heatmap, html_table, number, render, svg
from mergekit_lowrank.report.figures import chance_of_conflict, figures_of, mean_cosines, mean_sign_conflict
from mergekit_lowrank.report.manifest import Manifest
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.report.summary import LOADING, load_lines, percent

__all__ = ["merge_page"]

RECIPE_NAME = "recipe.yaml"
MOST_LISTED = 1000
"""Modules in the table of all of them, so that a page stays small."""
PLACE = "PATH"
"""The output in commands: a page does not know where it will lie."""

Draw: TypeAlias = Callable[[Figure], Markup]
KeyNumber: TypeAlias = tuple[str, str, str]


def merge_page(directory: str | Path, *, draw: Draw = svg) -> str:
    """The page of a finished output, from its ``report.json``, ``timings.json``, ``manifest.json`` and ``recipe.yaml``.

    Args:
        directory: of the output.
        draw: makes HTML of a figure.

    Raises:
        CheckpointError: one of the files is missing, damaged, or of another version of this package.
    """
    path = Path(directory)
    report, manifest = Report.read(path), Manifest.read(path)
    figures = figures_of(report)
    return render(
        "merge.html",
        draw=draw,
        report=report,
        manifest=manifest,
        told=[(own["module"], text) for own in report.modules for text in own["warnings"]],
        numbers=[*_of_the_update(report), *_of_the_inputs(report), *_of_the_run(report)],
        figures=_by_part([figure for figure in figures if _same(figure) is None]),
        same=[(figure.title, same, figure.description) for figure in figures if (same := _same(figure)) is not None],
        inputs=_inputs(report),
        modules=_modules(report),
        listed=min(len(report.modules), MOST_LISTED),
        sources=_sources(manifest),
        outputs=_outputs(manifest),
        recipe=_recipe(path),
        loading=[line.split(maxsplit=1) for line in load_lines(report, PLACE)],
        place=PLACE,
        server=None if report.server is None else LOADING[report.server].split()[0],
        at=_at(report),
        size=format_bytes(report.totals.bytes_written),
    )


def _recipe(directory: Path) -> str:
    path = directory / RECIPE_NAME
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Expected the recipe that a merge writes.") from error


def _by_part(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Figures by the part of the page that their keys begin with."""
    parts: dict[str, list[Figure]] = {"overview": [], "modules": [], "inputs": [], "spectra": [], "costs": []}
    for figure in figures:
        parts[figure.key.partition("-")[0]].append(figure)
    return parts


def _same(figure: Figure) -> str | None:
    """The number that all cells of a map hold, which needs no picture; None where they differ, or are printed."""
    if not isinstance(figure, Heatmap) or figure.is_printed:
        return None
    known = {value for row in figure.values for value in row if value is not None}
    return number(known.pop(), figure.unit) if len(known) == 1 else None


def _of_the_update(report: Report) -> Iterator[KeyNumber]:
    totals = report.totals
    times = f"{totals.merged_norm / totals.mean_input_norm:.3g} times the mean input" if totals.mean_input_norm else ""
    yield "Merged norm", number(totals.merged_norm), times or "the inputs are zero"
    yield "Energy kept", percent(totals.kept_energy), _at(report)
    if totals.rank_for_99 is not None:
        yield "Rank for 99 %", number(totals.rank_for_99), "of every module's energy"
    elif report.rank is not None:
        yield "Rank for 99 %", "higher", "than was decomposed, of a dense result"
    yield "Largest cut error", _share(totals.largest_cut_error), "of a module's norm"


def _at(report: Report) -> str:
    return "updates added whole" if report.rank is None else f"at {report.rank_text}"


def _of_the_inputs(report: Report) -> Iterator[KeyNumber]:
    cosines = mean_cosines(report)
    pairs = [value for i, row in enumerate(cosines) for value in row[:i] if value is not None]
    if pairs:
        between = f"of pairs, from {_cosine(min(pairs))} to {_cosine(max(pairs))}" if len(pairs) > 1 else "of the two"
        yield "Mean cosine", _cosine(sum(pairs) / len(pairs)), between
    conflict, chance = mean_sign_conflict(report), chance_of_conflict(report)
    if conflict is not None and chance is not None:
        yield "Sign conflict", _share(conflict), f"independent inputs: {_share(chance)}"


def _of_the_run(report: Report) -> Iterator[KeyNumber]:
    totals, peak = report.totals, report.memory.process_peak_bytes
    yield "Time", f"{number(totals.wall_seconds)} s", f"{format_bytes(totals.bytes_read)} read"
    if peak is not None:
        yield "Memory", format_bytes(peak), "the process at its peak"


def _cosine(value: float) -> str:
    """To three decimals, 0 without a sign."""
    return number(round(value, 3) + 0.0)


def _share(share: float | None) -> str:
    return "none" if share is None else number(100 * share, "%")


def _inputs(report: Report) -> Markup:
    columns = ("input", "from", "base model", "modules", "norm × weight")
    rows = [
        (own.label, _code(own.location), own.base_model, own.modules, number(own.weighted_norm))
        for own in report.inputs
    ]
    return html_table(columns, rows, right=columns[3:])


def _modules(report: Report) -> Markup:
    columns = ("module", "method", "space", "inputs", "rank", "norm", "energy kept", "cut error", "scale", "retention")
    rows = [
        (
            record["module"],
            record["method"],
            record["space"],
            _participants(record["participants"], report),
            "whole" if record["rank"] is None else record["rank"],
            number(record["merged_norm"]),
            percent(record["kept_energy"]),
            _share(record["cut_error"]),
            number(record["scale"]),
            number(record["retention"]),
        )
        for record in report.modules[:MOST_LISTED]
    ]
    return html_table(columns, rows, right=columns[4:])


def _participants(labels: Sequence[str], report: Report) -> str:
    return "all" if len(labels) == len(report.inputs) else ", ".join(labels)


def _sources(manifest: Manifest) -> Markup:
    columns = ("input", "file", "size", "SHA-256")
    rows = [
        (own.label, file.name, format_bytes(file.bytes), _code(file.sha256) if file.sha256 else "not hashed")
        for own in manifest.sources
        for file in own.files
    ]
    return html_table(columns, rows, right=("size",))


def _outputs(manifest: Manifest) -> Markup:
    columns = ("file", "size", "SHA-256")
    rows = [
        (file.name, format_bytes(file.bytes), _code(file.sha256) if file.sha256 else _hashed_apart(file.xxh3_128))
        for file in manifest.outputs
    ]
    return html_table(columns, rows, right=("size",))


def _hashed_apart(tensors: object) -> str:
    count = len(tensors) if isinstance(tensors, dict) else 0
    return f"each of its {count} tensors in manifest.json (xxh3)"


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)
