"""Numbers and places as words."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lowrank.report.grid import layer_and_kind

__all__ = ["NAMED", "counted", "named", "others", "percent", "places", "short"]

NAMED = 3
"""Inputs and modules are named up to this many."""


def named(names: Sequence[str]) -> str:
    """``a, b, c and 2 more``."""
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def others(count: int) -> str:
    """What is said of so many other pairs behind the first; nothing of none."""
    return f", and so for {count} other {'pair' if count == 1 else 'pairs'}" if count else ""


def counted(modules: Sequence[str], total: int) -> str:
    """``all 36 modules``, or how many and where.

    Args:
        modules: names.
        total: of the merge.
    """
    if len(modules) == total:
        return f"all {total} modules" if total > 1 else "the only module"
    return f"{len(modules)} {'module' if len(modules) == 1 else 'modules'} ({places(modules)})"


def places(modules: Sequence[str]) -> str:
    """``layers 20-31``, with the types where they are few; the names of modules in no layer."""
    placed = [layer_and_kind(module) for module in modules]
    layers = sorted({layer for layer, _ in placed if layer is not None})
    kinds = list(dict.fromkeys(kind for layer, kind in placed if layer is not None))
    loose = [kind for layer, kind in placed if layer is None]
    parts = [f"{'layer' if len(layers) == 1 else 'layers'} {_ranges(layers)}"] if layers else []
    if len(kinds) <= NAMED:
        parts += kinds
    return ", ".join([*parts, *([named(loose)] if loose else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """``0-5, 7`` for the ascending numbers 0 to 5 and 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def short(number: float) -> str:
    """Three digits of it."""
    return f"{number:.3g}"


def percent(share: float, digits: int = 0) -> str:
    """``24 %``."""
    return f"{100 * share:.{digits}f} %"
