"""Values by module from a CSV file: ``weight: {file: weights.csv}``, read as the filters that it lists."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank.errors import RecipeError, raise_together
from mergekit_lowrank.recipe.document import Document
from mergekit_lowrank.recipe.origin import Loc, Origin, Place, shown
from mergekit_lowrank.recipe.overrides import changed

__all__ = ["HEADER", "with_files_read"]

HEADER = ("pattern", "value")

MAX_BYTES = 1 << 20
"""Size of the largest file that is read; a recipe may be as large."""

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class _Line:
    """One value and the pattern of the modules that take it; ``number`` counts lines from 1."""

    number: int
    pattern: str
    value: float


def with_files_read(document: Document, origin: Origin) -> Document:
    """``document`` with the filters that a file lists in place of every ``{file: PATH}`` among parameters.

    What is written then holds the values themselves, so it does not depend on the file any more.

    Args:
        document: of a recipe, not checked yet.
        origin: paths start from its directory.

    Raises:
        RecipeError: every file that is missing, and every line that is not a pattern and a finite number.
    """
    origin = Origin(origin.name, origin.directory, document.places)
    problems: list[RecipeError] = []
    for loc, name in list(_files(document.data)):
        try:
            lines = _read(origin.directory, name, origin.prefix(loc))
        except RecipeError as error:
            problems += [problem for problem in error.problems if isinstance(problem, RecipeError)]
            continue
        filters = [{"filter": line.pattern, "value": line.value} for line in lines]
        document = changed(document, loc, filters, _places(lines, name, origin.where(loc)))
    raise_together(problems)
    return document


def _files(data: object) -> Iterator[tuple[Loc, str]]:
    """Every ``{file: PATH}`` that stands for the value of a parameter, with the way to it."""
    for at, holder in _holders(data):
        parameters = holder.get("parameters")
        for name, value in parameters.items() if isinstance(parameters, Mapping) else ():
            if isinstance(value, Mapping) and set(value) == {"file"} and isinstance(value["file"], str | os.PathLike):
                yield (*at, "parameters", name), os.fspath(value["file"])


def _holders(data: object) -> Iterator[tuple[Loc, Mapping[str, object]]]:
    """The recipe, its models and its rules: what has parameters."""
    if not isinstance(data, Mapping):
        return
    yield (), data
    for part in ("models", "rules"):
        entries = data.get(part)
        for index, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
            if isinstance(entry, Mapping):
                yield (part, index), entry


def _places(lines: Sequence[_Line], name: str, where: str) -> dict[Loc, Place]:
    places: dict[Loc, Place] = {(): Place(where, where)}
    for index, line in enumerate(lines):
        places[(index,)] = Place(f"{name}:{line.number}", f"{name}:{line.number}")
    return places


def _read(directory: Path, name: str, prefix: str) -> list[_Line]:
    rows = list(_rows(_text(directory, name, prefix), name))
    header = tuple(rows[0][1]) if rows else ()
    if header != HEADER:
        found = shown(",".join(header)) if rows else "nothing"
        raise RecipeError(f"{name}:{rows[0][0] if rows else 1}: expected the header 'pattern,value', found {found}")
    if len(rows) == 1:
        raise RecipeError(f"{name}:{rows[0][0]}: nothing after the header; expected lines such as '*,0.5'")
    lines: list[_Line] = []
    numbers: dict[str, int] = {}
    problems = []
    for number, cells in rows[1:]:
        try:
            lines.append(_line(number, cells, numbers))
            numbers[lines[-1].pattern] = number
        except RecipeError as error:  # noqa: PERF203 - the problems of all lines are wanted
            problems.append(RecipeError(f"{name}:{number}: {error}"))
    raise_together(problems)
    return lines


def _text(directory: Path, name: str, prefix: str) -> str:
    path = directory / name
    try:
        path = directory / Path(name).expanduser()
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{prefix}: there is no file {path}; a path starts from the recipe's directory") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last: "~name" of nobody
        raise RecipeError(f"{prefix}: {path} cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{prefix}: {path} is larger than {MAX_BYTES:,} bytes, the most that is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{prefix}: {path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x})"
        ) from None


def _rows(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, without blanks around them, after the number of the line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield number, [cell.strip() for cell in cells]
            number = reader.line_num + 1
    except csv.Error as error:
        raise RecipeError(f"{name}:{number}: not valid CSV: {error}") from None


def _line(number: int, cells: Sequence[str], before: Mapping[str, int]) -> _Line:
    if len(cells) != len(HEADER):
        quoted = "; put a pattern that holds commas in double quotes" if len(cells) > len(HEADER) else ""
        raise RecipeError(f"expected a pattern and a value, found {len(cells)} cells{quoted}")
    pattern, text = cells
    if pattern in before:
        raise RecipeError(f"the pattern {shown(pattern)} stands twice (first in line {before[pattern]})")
    return _Line(number, pattern, _number(text))


def _number(text: str) -> float:
    """The number that ``text`` is; a whole one stays whole, for parameters that count."""
    try:
        value = int(text) if _INTEGER.fullmatch(text) else float(text)
    except ValueError:
        value = math.nan
    if "_" in text or not text.isascii() or not math.isfinite(value):
        raise RecipeError(f"expected a finite number, found {shown(text)}")
    return value
