"""``report``: the page of a merge made again, its figures as images, and two merges side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from markupsafe import Markup

from mergekit_lowrank.cli.tables import aligned, fields
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import PAGE_NAME, writing
from mergekit_lowrank.pages import Figure, svg
from mergekit_lowrank.pages.interactive import interactive as plotly
from mergekit_lowrank.pages.interactive import with_plotly
from mergekit_lowrank.pages.png import write_image
from mergekit_lowrank.report import Report
from mergekit_lowrank.report.comparison import Difference, MergeComparison, compare_merges
from mergekit_lowrank.report.comparison_page import comparison_figures, comparison_page
from mergekit_lowrank.report.figures import figures_of
from mergekit_lowrank.report.outputs import require_merge
from mergekit_lowrank.report.page import merge_page

__all__ = ["run_report"]


def run_report(
    outputs: Sequence[str],
    *,
    page: str | None,
    interactive: bool,
    png: str | None,
    pdf: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the page and the images of one merge, or compare two, and print what was found or written."""
    subject = _one(Path(outputs[0])) if len(outputs) == 1 else _both(*outputs)
    target = subject.page if page is None else Path(page)
    directories = [(Path(directory), suffix) for directory, suffix in ((png, ".png"), (pdf, ".pdf")) if directory]
    images = {directory / f"{own.key}{suffix}": own for directory, suffix in directories for own in subject.figures}
    _refuse_files(directory for directory, _ in directories)
    if not overwrite:
        _refuse([*([] if page is None else [Path(page)]), *images])
    if target is not None:
        _put(target, with_plotly(subject.drawn(plotly)) if interactive else subject.drawn(svg))
    for path, figure in images.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(figure, path)
    click.echo(subject.json if as_json else subject.text, nl=False)
    if not (as_json or quiet):
        for path in [*([] if target is None else [target]), *images]:
            click.echo(f"wrote {path}")


@dataclass(frozen=True)
class _Subject:
    """What is reported on.

    Attributes:
        figures: all of its page.
        drawn: the page, given what draws figures.
        page: where it goes if nothing else is said; None for nowhere.
        json: all there is to say.
        text: the same, shorter, for people.
    """

    figures: Sequence[Figure]
    drawn: Callable[[Callable[[Figure], Markup]], str]
    page: Path | None
    json: str
    text: str


def _one(directory: Path) -> _Subject:
    require_merge(directory)
    report = Report.read(directory)
    return _Subject(
        figures_of(report), lambda draw: merge_page(directory, draw=draw), directory / PAGE_NAME, report.to_json(), ""
    )


def _both(a: str, b: str) -> _Subject:
    found = compare_merges(a, b)
    text = "\n".join([*_lines(found), ""])
    return _Subject(
        comparison_figures(found), lambda draw: comparison_page(found, draw=draw), None, found.to_json(), text
    )


def _put(path: Path, text: str) -> None:
    """Write a file that is whole at every moment: beside its place, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _refuse_files(directories: Iterable[Path]) -> None:
    for directory in directories:
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory}: is no directory; expected one to write images into. Choose another path.")


def _refuse(paths: Sequence[Path]) -> None:
    """Raise an ``OutputError`` that names the files which exist."""
    there = [str(path) for path in paths if path.exists()]
    if there:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise OutputError(
            f"{there[0]}{more}: exists already. Choose another path, or allow it to be overwritten (--overwrite)."
        )


def _lines(found: MergeComparison) -> Iterator[str]:
    columns = ("", "A", "B")
    yield from aligned(columns, [("directory", found.a.location, found.b.location), *found.facts()])
    yield ""
    yield from fields(_facts(found))


def _facts(found: MergeComparison) -> Iterator[tuple[str, str]]:
    measured = [own.distance for own in found.modules if own.distance is not None]
    if found.distance is not None:
        spread = f"{min(measured):.3g} to {max(measured):.3g} in {len(measured)} modules"
        yield "distance", f"{found.distance:.3g} of the norm of A ({spread})"
    if found.cosine is not None:
        yield "cosine", f"{found.cosine:.3g}"
    if measured and max(measured) == 0:
        yield "factors", "the same in every module"
    for number, own in enumerate(found.recipe):
        yield "" if number else "recipe", _difference(own)
    if not found.recipe:
        yield "recipe", "the same"
    for number, remark in enumerate(found.remarks):
        yield "" if number else "note", remark


def _difference(own: Difference) -> str:
    a, b = ("not set" if value is None else value for value in (own.a, own.b))
    return f"{own.key}: {a} -> {b}"
