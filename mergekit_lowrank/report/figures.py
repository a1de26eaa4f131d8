"""The figures of a merge, as data: what its report says of modules and inputs, in pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from mergekit_lowrank.lowrank import independent_conflict
from mergekit_lowrank.pages import Bars, Figure, Heatmap, Lines, Series, keys_of, number
from mergekit_lowrank.report.grid import grid, layer_and_kind
from mergekit_lowrank.report.results import Report

__all__ = ["COSINES", "around", "chance_of_conflict", "chance_text", "figures_of", "mean_cosines", "mean_sign_conflict"]

Record: TypeAlias = Mapping[str, Any]
Cosines: TypeAlias = tuple[tuple[float | None, ...], ...]

COSINES = (-0.1, 0.1)
"""Cosines and their colours: within this, unrelated inputs look alike."""
CONFLICT_REACH = 5.0
"""In percent: the same of sign conflict, to both sides of what independent inputs have."""
MOST_SPECTRA = 12
"""Spectra are drawn for the types of modules that hold most of the merged energy."""
LEAST_VALUE = 1e-6
"""Singular values below this share of the largest are rounding (float32 has seven digits)."""
SLOWEST = 8
MIB = 1 << 20


def figures_of(report: Report) -> tuple[Figure, ...]:
    """All figures of a merge that there are numbers for. Their keys begin with the part of the page they belong to."""
    found = (*_overview(report), *_of_modules(report), *_of_inputs(report), *_spectra(report), *_of_costs(report))
    return tuple(figure for figure in found if not isinstance(figure, Heatmap) or _holds_numbers(figure))


def mean_cosines(report: Report) -> Cosines:
    """The cosine of each two inputs, (n, n): the mean over their modules, weighted by the product of their norms.

    None where two inputs share no module in which both are not zero, or where cosines were not computed.
    """
    labels = [summary.label for summary in report.inputs]
    products = {(a, b): [0.0, 0.0] for a in labels for b in labels}
    for record in report.modules:
        for a, b, weight, cosine in _pairs(record):
            products[a, b][0] += weight * cosine
            products[a, b][1] += weight
    return tuple(
        tuple(products[a, b][0] / products[a, b][1] if products[a, b][1] else None for b in labels) for a in labels
    )


def mean_sign_conflict(report: Report) -> float | None:
    """The share of sign conflict over all modules, weighted by the energy of their inputs; None without any."""
    weighted = [
        (math.hypot(*record["input_norms"]) ** 2, record["sign_conflict"])
        for record in report.modules
        if record["sign_conflict"] is not None
    ]
    total = sum(weight for weight, _ in weighted)
    return sum(weight * share for weight, share in weighted) / total if total else None


def _pairs(record: Record) -> Iterator[tuple[str, str, float, float]]:
    """(label, label, product of the norms, cosine) of the inputs of a module."""
    for i, row in enumerate(record["cosines"]):
        for j, cosine in enumerate(row):
            if cosine is not None:
                norms = record["input_norms"]
                yield record["participants"][i], record["participants"][j], norms[i] * norms[j], cosine


def _holds_numbers(figure: Heatmap) -> bool:
    return any(value is not None for row in figure.values for value in row)


def _overview(report: Report) -> Iterator[Figure]:
    names = [summary.label for summary in report.inputs]
    yield Bars(
        "overview-norms",
        "Norms",
        "The Frobenius norm of each input's update over all modules, times its weight, and of the merged update as "
        "written. A merge much longer than its inputs acts stronger than any of them.",
        (*names, "the merged update"),
        (*(summary.weighted_norm for summary in report.inputs), report.totals.merged_norm),
    )


def _of_modules(report: Report) -> Iterator[Figure]:
    def by_layer(key: str, title: str, description: str, **rest: Any) -> Heatmap:
        return _by_layer(report, f"modules-{key}", title, description, **rest)

    is_estimated = any(record["relative_error_is_estimate"] for record in report.modules)
    estimated = " Large modules are estimated on 64 random inputs." if is_estimated else ""
    yield by_layer(
        "merged-norm",
        "Norm of the merged update",
        "The Frobenius norm of the update as written: where the merge changes the model most.",
        value=lambda record: record["merged_norm"],
    )
    yield by_layer(
        "cosine",
        "Overlap of the inputs",
        "The mean cosine between the updates of each two inputs. Near 0 they change different things; above 0 they "
        "agree, below 0 they undo each other.",
        value=_mean_cosine,
        centre=0.0,
        span=COSINES,
    )
    yield by_layer(
        "sign-conflict",
        "Sign conflict",
        "The share of the inputs' weighted entries that stands against the sign of its entry's sum: 0 % where all "
        f"pull the same way, 50 % where they cancel.{chance_text(chance_of_conflict(report))}{_sampled(report)}",
        value=lambda record: _percent(record["sign_conflict"]),
        unit="%",
        span=around(chance_of_conflict(report)),
    )
    yield by_layer(
        "lost-energy",
        "Energy that the cut took away",
        "The share of the merged update's squared norm that did not fit into the output rank. Nothing is lost at 0 %.",
        value=lambda record: _percent(max(0.0, 1 - record["kept_energy"])),
        unit="%",
    )
    yield by_layer(
        "relative-error",
        "Distance from the weighted sum",
        "How far the update as written lies from the exact weighted sum of the inputs, as a share of it. A method that "
        f"trims or elects signs leaves it on purpose; for sums and averages this is the error of the cut.{estimated}",
        value=lambda record: _percent(record["relative_error"]),
        unit="%",
    )
    yield by_layer(
        "rank-for-99",
        "Rank that holds 99 % of the energy",
        "The least rank that would keep 99 % of the merged update's energy. Where it is far below the written rank, "
        "the output could be smaller.",
        value=lambda record: record["rank_for_99"],
    )
    yield by_layer(
        "written-rank",
        "Written rank",
        "The rank of the factors in the output.",
        value=lambda record: record["written_rank"],
    )


def chance_of_conflict(report: Report) -> float | None:
    """The sign conflict of independent inputs with the norms of these; None of a single input, and of zeros."""
    return independent_conflict([summary.weighted_norm for summary in report.inputs])


def around(chance: float | None) -> tuple[float, float] | None:
    """What the colours of sign conflict, in percent, reach over at least."""
    return None if chance is None else (max(0.0, 100 * chance - CONFLICT_REACH), 100 * chance + CONFLICT_REACH)


def chance_text(chance: float | None) -> str:
    """What independent inputs would have, as a sentence after another; empty of None."""
    return "" if chance is None else f" Independent inputs of these sizes would have {number(100 * chance)} %."


def _sampled(report: Report) -> str:
    """How sure the sign conflict is."""
    error = max((record["sign_conflict_error"] for record in report.modules), default=0.0)
    return (
        f" Measured on a sample of entries, with a standard error of at most {number(100 * error)} %." if error else ""
    )


def _by_layer(
    report: Report,
    key: str,
    title: str,
    description: str,
    *,
    value: Callable[[Record], float | None],
    unit: str = "",
    centre: float | None = None,
    span: tuple[float, float] | None = None,
) -> Heatmap:
    names = [record["module"] for record in report.modules]
    rows, columns, values = grid(names, [value(record) for record in report.modules])
    shared = " In rows with * it is the mean over what stands for it." if any("*" in row for row in rows) else ""
    return Heatmap(
        key,
        title,
        f"{description}{shared}",
        rows,
        columns,
        values,
        unit=unit,
        centre=centre,
        column_label="layer",
        span=span,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _mean_cosine(record: Record) -> float | None:
    cosines = [value for i, row in enumerate(record["cosines"]) for value in row[:i] if value is not None]
    return sum(cosines) / len(cosines) if cosines else None


def _of_inputs(report: Report) -> Iterator[Figure]:
    labels = tuple(summary.label for summary in report.inputs)
    energies = [summary.weighted_norm**2 for summary in report.inputs]
    total = sum(energies)
    if total:
        yield Bars(
            "inputs-share",
            "Share of each input",
            "Its part of the inputs' energy: the squared norm of its update, times its weight, over the sum of all. "
            "An input with a small share may be hardly heard.",
            labels,
            tuple(100 * energy / total for energy in energies),
            unit="%",
            whole=100.0,
        )
    if len(labels) > 1:
        yield Heatmap(
            "inputs-cosines",
            "Cosines between the inputs",
            "The mean over all modules, weighted by the norms. 1: the same direction; 0: independent; −1: opposed.",
            labels,
            labels,
            mean_cosines(report),
            limits=(-1.0, 1.0),
            centre=0.0,
            is_printed=True,
        )
        yield _shares_by_layer(report, labels)


def _shares_by_layer(report: Report, labels: tuple[str, ...]) -> Heatmap:
    """The energy of each input in each layer, as a share of all inputs' there."""
    energies: dict[int | None, dict[str, float]] = {}
    for record in report.modules:
        own = energies.setdefault(layer_and_kind(record["module"])[0], {})
        for label, norm in zip(record["participants"], record["input_norms"], strict=True):
            own[label] = own.get(label, 0.0) + norm**2
    layers = sorted(layer for layer in energies if layer is not None)
    totals = {layer: sum(energies[layer].values()) for layer in layers}
    values = tuple(
        tuple(
            100 * energies[layer][label] / totals[layer] if totals[layer] and label in energies[layer] else None
            for layer in layers
        )
        for label in labels
    )
    return Heatmap(
        "inputs-share-by-layer",
        "Share of each input, layer by layer",
        "Its part of the energy of all inputs in a layer.",
        labels,
        tuple(map(str, layers)),
        values,
        unit="%",
        column_label="layer",
    )


def _spectra(report: Report) -> Iterator[Figure]:
    """Singular values before and after, for each type of module."""
    kinds: dict[str, list[Record]] = {}
    for record in report.modules:
        kinds.setdefault(layer_and_kind(record["module"])[1], []).append(record)
    by_energy = sorted(kinds, key=lambda kind: -sum(record["energy"] for record in kinds[kind]))
    chosen = [kind for kind in kinds if kind in by_energy[:MOST_SPECTRA]]
    for key, kind in zip(keys_of("spectra", chosen), chosen, strict=True):
        records = kinds[kind]
        series = tuple(_series(report, records))
        if series:
            count = f"{len(records)} modules" if len(records) > 1 else "1 module"
            yield Lines(key, kind, f"Over {count}.", "direction", "singular value", series, True)


def _series(report: Report, records: Sequence[Record]) -> Iterator[Series]:
    for summary in report.inputs:
        own = [
            record["input_spectra"][record["participants"].index(summary.label)]
            for record in records
            if summary.label in record["participants"]
        ]
        values = _root_mean_square(own)
        if values:
            yield Series(summary.label, values)
    merged = _root_mean_square([record["spectrum"] for record in records])
    if merged:
        yield Series("merged, before the cut", merged, is_emphasised=True)


def _root_mean_square(spectra: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Position by position, over those that are there; what is rounding left out at the end."""
    there = [spectrum for spectrum in spectra if spectrum]
    longest = max(map(len, there), default=0)
    values = [math.hypot(*(own[k] for own in there if k < len(own))) / math.sqrt(len(there)) for k in range(longest)]
    count = sum(value > LEAST_VALUE * values[0] for value in values)
    return tuple(values[:count])


def _of_costs(report: Report) -> Iterator[Figure]:
    memory = report.memory
    peak = memory.process_peak_bytes
    yield Bars(
        "costs-memory",
        "Memory",
        "What the largest module and all beside it may take at most, by the plan; what the merge was allowed; and the "
        "most that the whole process held, Python, torch and file pages included.",
        ("planned peak", "allowed", "process, in all"),
        (memory.planned_peak_bytes / MIB, memory.allowed_bytes / MIB, None if peak is None else peak / MIB),
        unit="MiB",
    )
    slowest = sorted(report.modules, key=lambda record: -record["wall_seconds"])[:SLOWEST]
    yield Bars(
        "costs-slowest",
        "Slowest modules",
        "The time of their merge, reading and writing apart. Modules are merged beside each other, so times add up to "
        "more than the merge took.",
        tuple(record["module"] for record in slowest),
        tuple(1000 * record["wall_seconds"] for record in slowest),
        unit="ms",
    )
    yield _by_layer(
        report,
        "costs-time",
        "Time",
        "How long the merge of each module took, reading and writing apart.",
        value=lambda record: 1000 * record["wall_seconds"],
        unit="ms",
    )
    yield _by_layer(
        report,
        "costs-peak",
        "Planned peak",
        "The memory that the plan set aside for each module, an upper bound.",
        value=lambda record: record["peak_bytes"] / MIB,
        unit="MiB",
    )
