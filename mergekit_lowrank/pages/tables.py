"""Numbers and tables as HTML, for pages and notebooks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import zip_longest

from markupsafe import Markup, escape

from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines

__all__ = ["figure_table", "html_table", "number"]

LEAST_GROUPED = 999.5
"""From here on numbers are written whole, in groups of three digits."""
LEAST_PLAIN = 1e-3
MOST_PLAIN = 1e9


def number(value: float | None, unit: str = "") -> str:
    """A number to three digits as people write it, with its unit; ``none`` for None."""
    if value is None:
        return "none"
    size = abs(value)
    if LEAST_GROUPED <= size < MOST_PLAIN:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if size == 0 or LEAST_PLAIN <= size < LEAST_GROUPED else f"{value:.2e}"
    return f"{text} {unit}" if unit else text


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", right: Collection[str] = ()
) -> Markup:
    """A table as HTML. All text is escaped, but for cells that are ``Markup``.

    Args:
        columns: names; the first heads the rows where there are several.
        rows: one cell for each column; None is an empty one.
        caption: above it; empty for none.
        right: names of the columns that are aligned to the right: numbers.
    """
    head = "".join(f'<th scope="col"{_side(name, right)}>{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{_cells(columns, row, right)}</tr>\n" for row in rows)
    above = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    # Every part is escaped above.
    return Markup(f"<table>\n{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>")  # noqa: S704


def figure_table(figure: Figure) -> Markup:
    """The numbers of a figure as a table."""
    match figure:
        case Heatmap():
            columns, rows = ["", *figure.columns], _rows_of(figure)
        case Lines():
            columns = [figure.x_label, *(series.name for series in figure.series)]
            positions = zip_longest(*(series.values for series in figure.series))
            rows = ([str(k), *map(_cell, values)] for k, values in enumerate(positions, start=1))
        case Bars():
            columns = ["", figure.unit or "value"]
            rows = ([label, _cell(value)] for label, value in zip(figure.labels, figure.values, strict=True))
    return html_table(columns, rows, right=columns[1:])


def _rows_of(figure: Heatmap) -> Iterator[list[str]]:
    for name, values in zip(figure.rows, figure.values, strict=True):
        yield [name, *map(_cell, values)]


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)


def _cells(columns: Sequence[str], row: Sequence[object], right: Collection[str]) -> str:
    cells = zip(columns, row, strict=True)
    return "".join(
        f'<th scope="row"{_side(name, right)}>{_text(cell)}</th>'
        if index == 0 and len(columns) > 1
        else f"<td{_side(name, right)}>{_text(cell)}</td>"
        for index, (name, cell) in enumerate(cells)
    )


def _side(name: str, right: Collection[str]) -> str:
    """Notebooks align all cells to the right unless each says otherwise."""
    return f' style="text-align:{"right" if name in right else "left"}"'


def _text(cell: object) -> Markup:
    return Markup("") if cell is None else escape(cell)
