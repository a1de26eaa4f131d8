"""Figures as plain data: what they show, in words and numbers. How they look is for those who draw them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Bars", "Figure", "Heatmap", "Lines", "Series", "keys_of"]

NAMELESS = "unnamed"
"""Of names without a letter or digit."""
LONGEST_KEY = 80
"""Letters of a name in a key, which names a file too."""


@dataclass(frozen=True)
class Heatmap:
    """A table of numbers, coloured.

    Attributes:
        key: unique on a page; letters, digits and hyphens.
        title: a few words.
        description: a sentence or two: what the numbers are and how to read them.
        rows: their names, top to bottom.
        columns: their names.
        values: (rows, columns); None where there is nothing.
        unit: behind a number, or empty.
        limits: of the colours; None for the least and the largest value.
        centre: where colours change from one hue to another, 0 of cosines; None for one hue.
        is_printed: whether the numbers stand in the cells: small tables, such as pairs of inputs.
        column_label: what all columns are, such as ``layer``; empty where their names say it.
        span: what the colours reach over at least, so that small differences look small; None for no such.
    """

    key: str
    title: str
    description: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: str = ""
    limits: tuple[float, float] | None = None
    centre: float | None = None
    is_printed: bool = False
    column_label: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One line of several.

    Attributes:
        name: in the legend.
        values: at 1, 2, 3, ….
        is_emphasised: whether it is drawn stronger than the others.
    """

    name: str
    values: tuple[float, ...]
    is_emphasised: bool = False


@dataclass(frozen=True)
class Lines:
    """Numbers in an order, such as singular values.

    Attributes:
        key: unique on a page; letters, digits and hyphens.
        title: a few words.
        description: a sentence or two.
        x_label: of the positions, which count from 1.
        y_label: of the numbers.
        series: at least one.
        is_logarithmic: whether equal ratios are equal lengths; numbers that are not above 0 are left out then.
    """

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Bars:
    """A number for each of a few things.

    Attributes:
        key: unique on a page; letters, digits and hyphens.
        title: a few words.
        description: a sentence or two.
        labels: of the bars, top to bottom.
        values: of the bars; None where there is nothing.
        unit: behind a number, or empty.
        intervals: (low, high) of each; empty without.
        whole: the number that fills the width, 100 of shares in percent; None for the largest.
    """

    key: str
    title: str
    description: str
    labels: tuple[str, ...]
    values: tuple[float | None, ...]
    unit: str = ""
    intervals: tuple[tuple[float, float], ...] = ()
    whole: float | None = None


Figure: TypeAlias = Heatmap | Lines | Bars


def keys_of(part: str, names: Iterable[str]) -> list[str]:
    """Keys of the figures of a part of a page, by what they show: ``spectra-self-attn-q-proj``.

    Different also for file systems that take capital and small letters alike.
    """
    keys: list[str] = []
    for name in names:
        slug = re.sub(r"[^0-9A-Za-z]+", "-", name).lower()[:LONGEST_KEY].strip("-")
        key = f"{part}-{slug or NAMELESS}"
        while key in keys:
            key = f"{key}-{len(keys)}"
        keys.append(key)
    return keys
