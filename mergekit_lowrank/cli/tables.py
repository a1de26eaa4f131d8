"""Text for people: aligned columns, and foreign text made safe to print."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["aligned", "fields", "one_line", "spans"]

GAP = "  "
LEAST_WRAPPED = 30
"""The last column is not made narrower than this."""


def one_line(text: object) -> str:
    """``text`` on one line and without control characters, for names that come out of files."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Iterator[str]:
    """A table, a line at a time; on a terminal its last column is wrapped.

    Args:
        header: names of the columns.
        rows: one text for each column.
        right: names of the columns that are aligned to the right.
    """
    table = [tuple(header), *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header[:-1], row[:-1], widths[:-1], strict=True)
        ]
        last = row[-1].rjust(widths[-1]) if header[-1] in right else row[-1]
        yield from _hanging(GAP.join([*cells, ""]) if cells else "", last)


def fields(pairs: Iterable[tuple[str, str]], *, indent: str = "") -> Iterator[str]:
    """Names and values, the values aligned."""
    listed = list(pairs)
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        yield from _hanging(f"{indent}{name.ljust(width)}{GAP}", one_line(value))


def _hanging(start: str, text: str) -> Iterator[str]:
    columns = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else 0
    if not columns or len(start) + len(text) <= columns:
        yield f"{start}{text}".rstrip()
        return
    first, *rest = textwrap.wrap(text, max(LEAST_WRAPPED, columns - len(start))) or [""]
    yield f"{start}{first}".rstrip()
    yield from (" " * len(start) + line for line in rest)


def spans(numbers: Iterable[int]) -> str:
    """``0-5,7`` for the numbers 0 to 5 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
