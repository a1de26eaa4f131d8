"""Where a recipe came from: the place of each key and value, for errors, and the directory paths start from."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

__all__ = ["Loc", "Origin", "Place", "dotted", "shown"]

Loc: TypeAlias = tuple[str | int, ...]
"""The way to a value from the top of the recipe, such as ``("models", 0, "parameters", "weight")``."""

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Place:
    """Where a key and its value stand, as errors say it: ``recipe.yaml:12:5`` or ``--set output.rank=8``."""

    key: str
    value: str


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from, which is no part of what it says: any two origins compare equal.

    Attributes:
        name: what errors call the recipe where no place is known.
        directory: what relative paths of models start from.
        places: the place of each key and value; empty when the recipe was not written as text.
    """

    name: str = field(default="recipe", compare=False)
    directory: Path = field(default_factory=Path.cwd, compare=False)
    places: Mapping[Loc, Place] = field(default_factory=dict, compare=False)

    def where(self, loc: Loc, *, key: bool = False) -> str:
        """The place of the value at ``loc`` (of its key, with ``key``), else of the nearest value around it."""
        for length in range(len(loc), -1, -1):
            place = self.places.get(loc[:length])
            if place:
                return place.key if key and length == len(loc) else place.value
        return self.name

    def prefix(self, loc: Loc, *, key: bool = False) -> str:
        """The start of an error about ``loc``: ``recipe.yaml:12:5: models[0].parameters.weight``."""
        where = self.where(loc, key=key)
        return f"{where}: {dotted(loc)}" if loc else where


def dotted(loc: Loc) -> str:
    """``models[0].parameters.weight`` for ``("models", 0, "parameters", "weight")``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_name(step)}" for step in loc)
    return "".join(steps).removeprefix(".")


def _name(key: str) -> str:
    return key if re.fullmatch(rf"[\w-]{{1,{SHOWN_CHARACTERS}}}", key) else shown(key)


def shown(value: object) -> str:
    """``value`` as an error shows it: short, on one line, YAML's words for true, false and null."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN_CHARACTERS
    return " ".join(short.repr(list(value) if isinstance(value, tuple) else value).split())
