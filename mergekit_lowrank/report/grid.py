"""Modules as a table: one row for each module type, one column for each layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["NO_LAYER", "Grid", "grid", "layer_and_kind"]

Grid: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[float | None, ...], ...]]

NO_LAYER = "-"
"""The column of modules that belong to no layer: embeddings, heads."""
MOST_ROWS = 32
"""With more module types than this, those that differ in a number alone (experts, rows of tokens) share a row."""

# As gradients over depth count layers, and the first number of other names (diffusion models, plain sequences).
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_OTHER_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])")


def layer_and_kind(module: str) -> tuple[int | None, str]:
    """The layer that a module lies in and its type: what follows the layer's number in its name.

    ``model.layers.3.self_attn.q_proj`` is (3, ``self_attn.q_proj``). A module in no layer is (None, its name).
    """
    _, layer, kind = _placed(module)
    return layer, kind


def grid(modules: Sequence[str], values: Sequence[float | None]) -> Grid:
    """Numbers of modules as (module types, layers, values), the layers as texts in ascending order.

    Types keep the order of their first module. Those that several towers have (a text and a vision encoder) carry the
    tower's name, and modules in no layer come last, in a first column ``NO_LAYER``. Above 32 types, those that differ
    in further numbers share a row, whose name has ``*`` in their place and whose values are means.

    Args:
        modules: names.
        values: of each; None where there is none.
    """
    places = [_placed(module) for module in modules]
    names = _row_names(places)
    if len(set(names)) > MOST_ROWS:
        names = [_OTHER_NUMBERS.sub("*", name) for name in names]
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, (_, layer, _), value in zip(names, places, values, strict=True):
        cells.setdefault((name, layer), []).extend([] if value is None else [value])
    layers = sorted({layer for _, layer in cells if layer is not None})
    columns = [None, *layers] if any(layer is None for _, layer in cells) else layers
    rows = sorted(dict.fromkeys(names), key=lambda name: (name, None) in cells)
    table = tuple(tuple(_mean(cells.get((row, column), ())) for column in columns) for row in rows)
    return tuple(rows), tuple(NO_LAYER if column is None else str(column) for column in columns), table


def _placed(module: str) -> tuple[str, int | None, str]:
    """What stands before the layer's number, the number, and what follows."""
    match = _LAYER.search(module) or _NUMBER.search(module)
    if match is None:
        return "", None, module
    return module[: match.start(1)].rstrip("."), int(match[1]), module[match.end() :]


def _row_names(places: Sequence[tuple[str, int | None, str]]) -> list[str]:
    """The types, with the tower's name where modules of several towers share one."""
    towers: dict[str, set[str]] = {}
    for tower, _, kind in places:
        towers.setdefault(kind, set()).add(tower)
    return [f"{tower}.*.{kind}" if len(towers[kind]) > 1 and tower else kind for tower, _, kind in places]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
