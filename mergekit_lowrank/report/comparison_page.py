"""Two merges side by side, to look at. One file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from markupsafe import Markup

from mergekit_lowrank.pages import Figure, Heatmap, Lines, Series, html_table, keys_of, number, render, svg
from mergekit_lowrank.report.comparison import ComparedModule, MergeComparison, Written
from mergekit_lowrank.report.grid import grid

__all__ = ["comparison_figures", "comparison_page"]

Draw: TypeAlias = Callable[[Figure], Markup]
KeyNumber: TypeAlias = tuple[str, str, str]
SAME = {True: "same files", False: "other files", None: "not known"}
ROUNDING = 1e-9
"""Differences up to this are none: numbers in reports are sums in float64."""


def comparison_page(comparison: MergeComparison, *, draw: Draw = svg) -> str:
    """The page of a comparison.

    Args:
        comparison: what ``compare_merges`` gave.
        draw: makes HTML of a figure.
    """
    figures = comparison_figures(comparison)
    return render(
        "comparison.html",
        draw=draw,
        comparison=comparison,
        numbers=list(_key_numbers(comparison)),
        heatmaps=[figure for figure in figures if isinstance(figure, Heatmap)],
        lines=[figure for figure in figures if isinstance(figure, Lines)],
        unchanged=[title for title, own in _measures(comparison).items() if not _varies(own)],
        facts=html_table(("", "A", "B"), comparison.facts()),
        recipe=_recipe(comparison),
        inputs=_inputs(comparison),
        modules=_modules(comparison),
    )


def comparison_figures(comparison: MergeComparison) -> tuple[Figure, ...]:
    """Heat maps of distances and of differences B − A, then spectra; without those in which nothing differs."""
    maps = [own for own in _measures(comparison).values() if _varies(own)]
    lines = [
        Lines(
            key,
            own.kind,
            "Singular values before the cut: the root mean square over the modules of this type.",
            "direction",
            "singular value",
            (Series("A", own.a), Series("B", own.b, is_emphasised=True)),
            is_logarithmic=True,
        )
        for key, own in zip(
            keys_of("spectra", (own.kind for own in comparison.spectra)), comparison.spectra, strict=True
        )
    ]
    return (*maps, *lines)


def _varies(figure: Heatmap) -> bool:
    """Whether it shows anything: a distance, or a difference that is not 0."""
    same = 1.0 if figure.key == "cosine" else 0.0
    values = [value for row in figure.values for value in row if value is not None]
    return any(abs(value - same) > ROUNDING for value in values)


def _measures(comparison: MergeComparison) -> dict[str, Heatmap]:
    """All heat maps by title."""
    found = [*_of_the_updates(comparison), *_of_the_reports(comparison)]
    return {figure.title: figure for figure in found}


def _of_the_updates(comparison: MergeComparison) -> Iterator[Heatmap]:
    yield _map(
        comparison,
        "distance",
        "Distance of the updates",
        "‖M_A − M_B‖ as a share of ‖M_A‖, from the stored factors. 0 %: the same update; 141 %: independent updates of "
        "one size; 200 %: opposed ones.",
        lambda own: None if own.distance is None else 100 * own.distance,
        unit="%",
        limits=(0.0, max((100 * (own.distance or 0.0) for own in comparison.modules), default=0.0)),
    )
    yield _map(
        comparison,
        "cosine",
        "Cosine of the updates",
        "The direction alone: 1 where both point the same way however large they are, 0 where they are independent.",
        lambda own: own.cosine,
        limits=(-1.0, 1.0),
        centre=0.0,
    )


def _of_the_reports(comparison: MergeComparison) -> Iterator[Heatmap]:
    yield _map(
        comparison,
        "norm",
        "Norm of B beside A",
        "How much larger (+) or smaller (−) the update of B is.",
        _of_both(lambda a, b: 100 * (b.merged_norm / a.merged_norm - 1) if a.merged_norm else None),
        unit="%",
        centre=0.0,
    )
    yield _map(
        comparison,
        "kept-energy",
        "Energy kept, B − A",
        "In points of percent: above 0 the cut of B lost less of its update.",
        _of_both(lambda a, b: 100 * (b.kept_energy - a.kept_energy)),
        unit="%",
        centre=0.0,
    )
    yield _map(
        comparison,
        "relative-error",
        "Error against Σ w·ΔW, B − A",
        "In points of percent: above 0 the update of B is further from the exact weighted sum. Methods may mean to be.",
        _of_both(_error_difference),
        unit="%",
        centre=0.0,
    )
    yield _map(
        comparison,
        "rank",
        "Written rank, B − A",
        "Above 0 B stores more directions.",
        _of_both(_rank_difference),
        centre=0.0,
    )


def _error_difference(a: Written, b: Written) -> float | None:
    if a.relative_error is None or b.relative_error is None:
        return None
    return 100 * (b.relative_error - a.relative_error)


def _rank_difference(a: Written, b: Written) -> float | None:
    return None if a.written_rank is None or b.written_rank is None else b.written_rank - a.written_rank


def _of_both(difference: Callable[[Written, Written], float | None]) -> Callable[[ComparedModule], float | None]:
    """The difference in a module; None where either merge lacks it."""
    return lambda own: None if own.a is None or own.b is None else difference(own.a, own.b)


def _map(
    comparison: MergeComparison,
    key: str,
    title: str,
    description: str,
    value: Callable[[ComparedModule], float | None],
    *,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
) -> Heatmap:
    rows, columns, values = grid([own.module for own in comparison.modules], [*map(value, comparison.modules)])
    return Heatmap(key, title, description, rows, columns, values, unit, limits, centre, column_label="layer")


def _key_numbers(comparison: MergeComparison) -> Iterator[KeyNumber]:
    measured = [own for own in comparison.modules if own.distance is not None]
    if comparison.distance is not None:
        yield "Distance", number(100 * comparison.distance, "%"), f"of the norm of A, over {len(measured)} modules"
    if comparison.cosine is not None:
        yield "Cosine", number(comparison.cosine), "of both updates as a whole"
    if measured:
        furthest = max(measured, key=lambda own: own.distance or 0.0)
        yield "Largest distance", number(100 * (furthest.distance or 0.0), "%"), f"in {furthest.module}"
        equal = sum(own.distance == 0 for own in measured)
        yield "Equal modules", f"{equal} of {len(measured)}", "with the same factors"
    a, b = comparison.a.totals.merged_norm, comparison.b.totals.merged_norm
    if a:
        yield "Norm of B", number(b / a), "times that of A"
    count = len(comparison.recipe)
    yield "Recipe keys", str(count), f"{'is' if count == 1 else 'are'} not the same in both"


def _recipe(comparison: MergeComparison) -> Markup:
    rows = [(_code(own.key), _code(own.a), _code(own.b)) for own in comparison.recipe]
    return html_table(("key", "A", "B"), rows)


def _inputs(comparison: MergeComparison) -> Markup:
    columns = ("input", "norm × weight in A", "in B", "files")
    rows = [(own.label, _shown(own.a_norm), _shown(own.b_norm), SAME[own.is_same]) for own in comparison.inputs]
    return html_table(columns, rows, right=columns[1:3])


def _modules(comparison: MergeComparison) -> Markup:
    columns = ("module", "distance", "cosine", "rank A", "rank B", "norm A", "norm B", "energy kept A", "energy kept B")
    rows = [(own.module, _shown(own.distance), _shown(own.cosine), *_cells(own.a, own.b)) for own in comparison.modules]
    return html_table(columns, rows, right=columns[1:])


def _cells(a: Written | None, b: Written | None) -> Iterator[str]:
    """What was written by A and by B, column after column."""
    for cells in zip(_written(a), _written(b), strict=True):
        yield from cells


def _written(own: Written | None) -> tuple[str, str, str]:
    """Rank, norm and energy kept."""
    if own is None:
        return "absent", "absent", "absent"
    rank = "whole" if own.written_rank is None else str(own.written_rank)
    return rank, number(own.merged_norm), number(100 * own.kept_energy, "%")


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def _code(text: str | None) -> Markup:
    return Markup("not set") if text is None else Markup("<code>{}</code>").format(text)
