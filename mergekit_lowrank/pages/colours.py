"""Colours of figures: perceptually uniform, and told apart without red and green."""

from __future__ import annotations

from mergekit_lowrank.pages.figures import Heatmap

__all__ = ["DIVERGING", "LINE_COLOURS", "SEQUENTIAL", "limits_of", "scale_of"]

SEQUENTIAL = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
)
"""Viridis (van der Walt and Smith 2015), ten steps of it from low to high."""
DIVERGING = (
    "#b2182b",
    "#d6604d",
    "#f4a582",
    "#fddbc7",
    "#f7f7f7",
    "#d1e5f0",
    "#92c5de",
    "#4393c3",
    "#2166ac",
)
"""ColorBrewer's RdBu (Brewer 2003) from below the centre to above it."""
LINE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito 2008, but for black and yellow: all can be seen on light and dark pages."""


def scale_of(figure: Heatmap) -> tuple[str, ...]:
    """The colours of a heat map, at equal distances from its lower limit to its upper one."""
    return SEQUENTIAL if figure.centre is None else DIVERGING


def limits_of(figure: Heatmap) -> tuple[float, float]:
    """The numbers at the ends of the colours: those given, or the least and the largest; alike around a centre."""
    known = [value for row in (*figure.values, figure.span or ()) for value in row if value is not None]
    low, high = figure.limits or (min(known, default=0.0), max(known, default=1.0))
    if figure.centre is None:
        return low, high if high > low else low + (abs(low) or 1.0)
    reach = max(abs(high - figure.centre), abs(figure.centre - low)) or 1.0
    return figure.centre - reach, figure.centre + reach
