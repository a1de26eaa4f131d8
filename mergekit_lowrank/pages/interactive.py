"""Figures drawn by Plotly: zoom, pan, numbers under the pointer, legends that switch lines off."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, TypeAlias

from markupsafe import Markup

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.pages.colours import LINE_COLOURS, limits_of, scale_of
from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines
from mergekit_lowrank.pages.tables import number

__all__ = ["interactive", "with_plotly"]

Plot: TypeAlias = dict[str, Any]

ROW_PIXELS = 24
FRAME_PIXELS = 120
"""Axes, ticks and the tools above a plot."""
DASHES = ("solid", "dash", "dot")
"""Of more lines than there are colours."""
LEAST_PIXELS = 240
LINES_PIXELS = 380
TICKS = 6
NOTHING = "rgba(128, 128, 128, 0.2)"
"""Behind heat maps: cells without a number."""
PLOTLY_IS_MISSING = (
    "interactive pages are drawn with the package plotly, which is not installed: "
    "pip install 'mergekit-lowrank[report]'. The static page needs nothing more."
)


def interactive(figure: Figure) -> Markup:
    """A figure as a ``<div>`` that the scripts of ``with_plotly`` draw into once it is seen."""
    plot = json.dumps(_plot(figure), allow_nan=False, separators=(",", ":"))
    return Markup(
        '<div class="plot" role="img" aria-label="{}. {}" style="height: {}px" data-plot="{}">'
        "<noscript>This figure is drawn by a script. Its numbers stand below.</noscript></div>"
    ).format(figure.title, figure.description, _height(figure), plot)


def with_plotly(page: str) -> str:
    """A page with Plotly inside, so that what ``interactive`` made is drawn without a network.

    Raises:
        OutputError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise OutputError(PLOTLY_IS_MISSING) from error
    drawing = files("mergekit_lowrank.pages").joinpath("templates/plots.js").read_text(encoding="utf-8")
    body, end, rest = page.rpartition("</body>")
    return f"{body}<script>{get_plotlyjs()}</script>\n<script>\n{drawing}</script>\n{end}{rest}"


def _height(figure: Figure) -> int:
    match figure:
        case Heatmap():
            return max(LEAST_PIXELS, FRAME_PIXELS + ROW_PIXELS * len(figure.rows))
        case Bars():
            return max(LEAST_PIXELS, FRAME_PIXELS + ROW_PIXELS * len(figure.labels))
        case Lines():
            return LINES_PIXELS


def _plot(figure: Figure) -> Plot:
    """What Plotly draws: ``data`` and ``layout``; what is black in it takes the colour of the page's text."""
    match figure:
        case Heatmap():
            return _heatmap(figure)
        case Lines():
            return _lines(figure)
        case Bars():
            return _bars(figure)


def _heatmap(figure: Heatmap) -> Plot:
    low, high = limits_of(figure)
    colours = scale_of(figure)
    where = f"{figure.column_label} " if figure.column_label else ""
    trace = {
        "type": "heatmap",
        "x": figure.columns,
        "y": figure.rows,
        "z": figure.values,
        "zmin": low,
        "zmax": high,
        "colorscale": [(step / (len(colours) - 1), colour) for step, colour in enumerate(colours)],
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": f"%{{y}}, {where}%{{x}}<br><b>%{{z:.4~g}}{_unit(figure.unit)}</b><extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0, "ticksuffix": _unit(figure.unit)},
    }
    if figure.is_printed:
        trace["text"] = [["" if value is None else number(value) for value in row] for row in figure.values]
        trace["texttemplate"] = "%{text}"
    axis = {"type": "category", "automargin": True, "showgrid": False}
    x = {**axis, "title": {"text": figure.column_label}}
    return {
        "data": [trace],
        "layout": _layout(xaxis=x, yaxis={**axis, "autorange": "reversed"}, plot_bgcolor=NOTHING),
    }


def _lines(figure: Lines) -> Plot:
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if len(series.values) > 1 else "markers",
            "name": series.name,
            "x": list(range(1, len(series.values) + 1)),
            "y": [value if value > 0 or not figure.is_logarithmic else None for value in series.values],
            "line": {
                "color": "black" if series.is_emphasised else LINE_COLOURS[n % len(LINE_COLOURS)],
                "width": 3 if series.is_emphasised else 1.5,
                "dash": DASHES[n // len(LINE_COLOURS) % len(DASHES)],
            },
            "hovertemplate": f"{figure.x_label} %{{x}}: <b>%{{y:.4~g}}</b>",
        }
        for n, series in enumerate(figure.series)
    ]
    x = {"title": {"text": figure.x_label}, "automargin": True, "rangemode": "tozero"}
    y = {
        "title": {"text": figure.y_label},
        "automargin": True,
        "type": "log" if figure.is_logarithmic else "linear",
        "exponentformat": "power",
        "nticks": TICKS,
    }
    layout = _layout(xaxis=x, yaxis=y, showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return {"data": traces, "layout": layout}


def _bars(figure: Bars) -> Plot:
    trace: Plot = {
        "type": "bar",
        "orientation": "h",
        "x": figure.values,
        "y": figure.labels,
        "marker": {"color": LINE_COLOURS[0]},
        "hovertemplate": f"%{{y}}: <b>%{{x:.4~g}}{_unit(figure.unit)}</b><extra></extra>",
    }
    if figure.intervals:
        pairs = [(value or 0.0, *interval) for value, interval in zip(figure.values, figure.intervals, strict=True)]
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - value for value, _, high in pairs],
            "arrayminus": [value - low for value, low, _ in pairs],
            "color": "black",
        }
    x: Plot = {"ticksuffix": _unit(figure.unit), "automargin": True}
    if figure.whole is not None:
        x["range"] = (0, figure.whole)
    y = {"type": "category", "automargin": True, "autorange": "reversed"}
    return {"data": [trace], "layout": _layout(xaxis=x, yaxis=y)}


def _layout(**parts: Any) -> Plot:
    margin = {"l": 8, "r": 8, "t": 32, "b": 8}
    return {"margin": margin, "hoverlabel": {"align": "left"}, "showlegend": False, **parts}


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""
