"""A diagnosis to look at: findings first, then every measure by pair, by module and by input. One file, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

from markupsafe import Markup

from mergekit_lowrank.diagnostics.diagnosis import Diagnosis, Matrix, ModuleDiagnosis, Vector
from mergekit_lowrank.lowrank import independent_conflict
from mergekit_lowrank.pages import Bars, Figure, Heatmap, html_table, number, render, svg
from mergekit_lowrank.report.figures import COSINES, around, chance_text
from mergekit_lowrank.report.grid import NO_LAYER, grid, layer_and_kind

__all__ = ["diagnosis_figures", "diagnosis_page"]

Draw: TypeAlias = Callable[[Figure], Markup]
KeyNumber: TypeAlias = tuple[str, str, str]
WHOLE = (0.0, 1.0)
PERCENT = (0.0, 100.0)


def diagnosis_page(diagnosis: Diagnosis, *, draw: Draw = svg) -> str:
    """The page of a diagnosis.

    Args:
        diagnosis: what ``diagnose`` gave.
        draw: makes HTML of a figure.
    """
    parts: dict[str, list[Figure]] = {"overview": [], "pairs": [], "modules": [], "inputs": []}
    for figure in diagnosis_figures(diagnosis):
        parts[figure.key.partition("-")[0]].append(figure)
    return render(
        "diagnosis.html",
        draw=draw,
        diagnosis=diagnosis,
        numbers=list(_key_numbers(diagnosis)),
        figures=parts,
        inputs=_inputs(diagnosis),
        modules=_modules(diagnosis),
        number=number,
    )


def diagnosis_figures(diagnosis: Diagnosis) -> tuple[Figure, ...]:
    """All figures of the page; their keys begin with the part that they stand in."""
    maps = (*_of_pairs(diagnosis), *_of_modules(diagnosis), *_of_inputs(diagnosis))
    return (_shares(diagnosis), *(own for own in maps if _has_numbers(own)))


def _has_numbers(figure: Heatmap) -> bool:
    return any(value is not None for row in figure.values for value in row)


def _shares(diagnosis: Diagnosis) -> Bars:
    return Bars(
        "overview-shares",
        "Share of each input",
        "Its part of the inputs' energy: the squared norm of its update, times its weight, over the sum of all.",
        diagnosis.labels,
        tuple(_percent(own.share) for own in diagnosis.inputs),
        unit="%",
        whole=100.0,
    )


def _of_pairs(diagnosis: Diagnosis) -> Iterator[Heatmap]:
    if len(diagnosis.inputs) < 2:
        return
    pairs = diagnosis.pairs

    def table(key: str, title: str, description: str, values: Matrix, **look: object) -> Heatmap:
        labels = diagnosis.labels
        return Heatmap(f"pairs-{key}", title, description, labels, labels, values, is_printed=True, **look)  # type: ignore[arg-type]

    yield table(
        "cosines",
        "Cosine of the updates",
        "1: the same direction; 0: independent; −1: opposed, so that each undoes the other.",
        pairs.cosines,
        limits=(-1.0, 1.0),
        centre=0.0,
    )
    yield table(
        "sign-conflicts",
        "Opposed signs",
        "The share of the entries, zero in neither, whose signs differ. Unrelated updates have 50 %.",
        _each(pairs.sign_conflicts, _percent),
        unit="%",
        limits=PERCENT,
        centre=50.0,
    )
    yield table(
        "row-overlaps",
        "Overlap of the row spaces",
        "Mean cos² of the principal angles between what the two updates read: 1 the same, 0 nothing in common.",
        pairs.row_overlaps,
        limits=WHOLE,
    )
    yield table(
        "column-overlaps",
        "Overlap of the column spaces",
        "The same of what the two updates write to.",
        pairs.column_overlaps,
        limits=WHOLE,
    )
    yield table(
        "row-alignments",
        "Alignment of the rows",
        "The share of the norm of the input that a row names which lies in the leading row directions of the one that "
        "the column names.",
        pairs.row_alignments,
        limits=WHOLE,
    )
    yield table(
        "column-alignments",
        "Alignment of the columns",
        "The same of column directions.",
        pairs.column_alignments,
        limits=WHOLE,
    )
    yield table(
        "row-angles",
        "Smallest angle of the row spaces",
        "In degrees: 0 where both share a direction, 90 where they share nothing.",
        _each(pairs.smallest_row_angles, _degrees),
        unit="°",
        limits=(0.0, 90.0),
    )
    yield table(
        "column-angles",
        "Smallest angle of the column spaces",
        "The same of what the two updates write to.",
        _each(pairs.smallest_column_angles, _degrees),
        unit="°",
        limits=(0.0, 90.0),
    )


def _of_modules(diagnosis: Diagnosis) -> Iterator[Heatmap]:
    names = [own.module for own in diagnosis.modules]

    def by_layer(
        key: str, title: str, description: str, value: Callable[[ModuleDiagnosis], float | None], **look: object
    ) -> Heatmap:
        rows, columns, values = grid(names, [*map(value, diagnosis.modules)])
        return Heatmap(f"modules-{key}", title, description, rows, columns, values, column_label="layer", **look)  # type: ignore[arg-type]

    chance = _chance_of_conflict(diagnosis)
    if len(diagnosis.inputs) > 1:
        yield by_layer(
            "cosines",
            "Cosine of the updates",
            "The mean over all pairs of inputs.",
            lambda own: _mean_of_pairs(own.cosines),
            centre=0.0,
            span=COSINES,
        )
        yield by_layer(
            "row-overlaps",
            "Overlap of the row spaces",
            "The mean over all pairs: 1 where all read the same directions, 0 where none are shared.",
            lambda own: _mean_of_pairs(own.row_overlaps),
            limits=WHOLE,
        )
        yield by_layer(
            "column-overlaps",
            "Overlap of the column spaces",
            "The mean over all pairs: 1 where all write to the same directions.",
            lambda own: _mean_of_pairs(own.column_overlaps),
            limits=WHOLE,
        )
        yield by_layer(
            "sign-conflict",
            "Sign conflict",
            "The share of all that is added which stands against the sign of its entry's sum: 0 % where all pull the "
            f"same way, 50 % where they cancel.{chance_text(chance)}",
            lambda own: _percent(own.sign_conflict),
            unit="%",
            span=around(chance),
        )
    yield by_layer(
        "kept-energy",
        "Energy that the output rank keeps",
        "Of the exact weighted sum, cut to the planned rank.",
        lambda own: _percent(own.sum_kept_energy),
        unit="%",
    )
    yield by_layer(
        "effective-rank",
        "Effective rank of the weighted sum",
        "How many directions hold it, about: e to the entropy of its singular values.",
        lambda own: own.sum_effective_rank,
    )


def _of_inputs(diagnosis: Diagnosis) -> Iterator[Heatmap]:
    """Per-input measures over depth and over module types: one row for each input, however many there are."""
    places: tuple[tuple[str, str, Callable[[str], str]], ...] = (
        ("layer", "by layer", _layer),
        ("", "by module type", lambda module: layer_and_kind(module)[1]),
    )
    for label, how, place in places:
        key = label or "type"
        yield _heatmap_of(
            diagnosis,
            f"inputs-share-{key}",
            f"Share of each input, {how}",
            "Its part of the energy of all inputs there, weights included.",
            _shares_at(diagnosis, place),
            unit="%",
            column_label=label,
        )
        for name, title, description, values, limits in _measures_of_inputs():
            yield _heatmap_of(
                diagnosis,
                f"inputs-{name}-{key}",
                f"{title}, {how}",
                description,
                _means_at(diagnosis, place, values),
                limits=limits,
                column_label=label,
            )


Measured: TypeAlias = tuple[str, str, str, Callable[[ModuleDiagnosis], Vector], tuple[float, float] | None]
"""The key of a measure of inputs, its title and description, where it stands, and the limits of its colours."""


def _measures_of_inputs() -> tuple[Measured, ...]:
    stable = "Energy over that of the strongest direction: how many directions are as strong as the first."
    head = "Cosine of an input's leading quarter of singular directions and what this merge turns them to: 1 unchanged."
    tail = "The same of the trailing quarter, which merges turn most."
    return (
        ("stable-rank", "Stable rank", stable, lambda own: own.stable_ranks, None),
        ("head", "Robustness of the strong directions", head, lambda own: own.robustness_head, WHOLE),
        ("tail", "Robustness of the weak directions", tail, lambda own: own.robustness_tail, WHOLE),
    )


Table: TypeAlias = dict[tuple[str, str], float]
"""Numbers by place and label of an input."""


def _means_at(diagnosis: Diagnosis, place: Callable[[str], str], values: Callable[[ModuleDiagnosis], Vector]) -> Table:
    sums: Table = {}
    weights: Table = {}
    for own in diagnosis.modules:
        for label, value, size in zip(own.participants, values(own), own.norms, strict=True):
            if value is not None:
                key = place(own.module), label
                sums[key] = sums.get(key, 0.0) + value * size * size
                weights[key] = weights.get(key, 0.0) + size * size
    return {key: total / weights[key] for key, total in sums.items() if weights[key]}


def _shares_at(diagnosis: Diagnosis, place: Callable[[str], str]) -> Table:
    energies: Table = {}
    totals: dict[str, float] = {}
    for own in diagnosis.modules:
        where = place(own.module)
        for label, size, weight in zip(own.participants, own.norms, own.weights, strict=True):
            energies[where, label] = energies.get((where, label), 0.0) + (size * weight) ** 2
            totals[where] = totals.get(where, 0.0) + (size * weight) ** 2
    return {(where, label): 100 * own / totals[where] for (where, label), own in energies.items() if totals[where]}


def _heatmap_of(diagnosis: Diagnosis, key: str, title: str, description: str, table: Table, **look: object) -> Heatmap:
    """Inputs by places; layers in ascending order, module types in that of their first module."""
    columns = list(dict.fromkeys(where for where, _ in table))
    if look["column_label"]:
        columns.sort(key=lambda where: math.inf if where == NO_LAYER else int(where))
    values = tuple(tuple(table.get((where, label)) for where in columns) for label in diagnosis.labels)
    return Heatmap(key, title, description, diagnosis.labels, tuple(columns), values, **look)  # type: ignore[arg-type]


def _layer(module: str) -> str:
    layer, _ = layer_and_kind(module)
    return NO_LAYER if layer is None else str(layer)


def _chance_of_conflict(diagnosis: Diagnosis) -> float | None:
    return independent_conflict([own.weighted_norm for own in diagnosis.inputs])


def _mean_of_pairs(table: Matrix) -> float | None:
    values = _pairs(table)
    return sum(values) / len(values) if values else None


def _pairs(table: Matrix) -> list[float]:
    """What is known of two different inputs, each pair once."""
    return [value for s, row in enumerate(table) for value in row[:s] if value is not None]


def _each(table: Matrix, change: Callable[[float | None], float | None]) -> Matrix:
    return tuple(tuple(map(change, row)) for row in table)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _degrees(angle: float | None) -> float | None:
    return None if angle is None else math.degrees(angle)


def _key_numbers(diagnosis: Diagnosis) -> Iterator[KeyNumber]:
    yield "Inputs", str(len(diagnosis.inputs)), f"over {len(diagnosis.modules)} modules"
    for name, table in (
        ("Cosine", diagnosis.pairs.cosines),
        ("Row overlap", diagnosis.pairs.row_overlaps),
        ("Column overlap", diagnosis.pairs.column_overlaps),
    ):
        values = _pairs(table)
        if values:
            mean, low, high = (_rounded(value) for value in (sum(values) / len(values), min(values), max(values)))
            yield name, mean, f"of pairs, from {low} to {high}"
    chance = _chance_of_conflict(diagnosis)
    if diagnosis.sign_conflict is not None and chance is not None:
        independent = f"independent inputs: {number(100 * chance, '%')}; 50 % cancels"
        yield "Sign conflict", number(100 * diagnosis.sign_conflict, "%"), independent
    if diagnosis.core_overlap is not None:
        rows, columns = diagnosis.core_overlap
        yield "Core overlap", f"{rows:.2f}", f"of rows, {columns:.2f} of columns; the lower, the less inputs meet"


def _rounded(value: float) -> str:
    """To two decimals, 0 without a sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def _inputs(diagnosis: Diagnosis) -> Markup:
    columns = ("input", "weight", "norm", "share", "stable rank", "effective rank", "gap", "head", "tail", "modules")
    rows = [
        (
            own.label,
            " to ".join(dict.fromkeys(map(number, own.weights))),
            number(own.norm),
            _shown(_percent(own.share), "%"),
            *map(_shown, (own.stable_rank, own.effective_rank, own.gap, own.robustness_head, own.robustness_tail)),
            own.modules,
        )
        for own in diagnosis.inputs
    ]
    return html_table(columns, rows, right=columns[1:])


def _modules(diagnosis: Diagnosis) -> Markup:
    columns = ("module", "out × in", "inputs", "cosine", "rows", "columns", "sign conflict", "kept", "merged norm")
    rows = [
        (
            own.module,
            f"{own.d_out} × {own.d_in}",
            "all" if len(own.participants) == len(diagnosis.inputs) else ", ".join(own.participants),
            *map(_shown, map(_mean_of_pairs, (own.cosines, own.row_overlaps, own.column_overlaps))),
            _shown(_percent(own.sign_conflict), "%"),
            _shown(_percent(own.sum_kept_energy), "%"),
            number(own.merged_norm),
        )
        for own in diagnosis.modules
    ]
    return html_table(columns, rows, right=columns[3:])


def _shown(value: float | None, unit: str = "") -> str:
    return "" if value is None else number(value, unit)
