"""Figures as files, for papers: PNG, PDF or SVG, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.pages.colours import LINE_COLOURS, limits_of, scale_of
from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines
from mergekit_lowrank.pages.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SUFFIXES", "write_image"]

SUFFIXES = (".png", ".pdf", ".svg")
DPI = 200
WIDTH_INCHES = 6.8
"""Two columns of most papers."""
ROW_INCHES = 0.24
FRAME_INCHES = 1.1
"""Title, labels and margins."""
LINES_INCHES = 3.4
LEAST_INCHES = 1.8
MOST_LABELS = 24
"""Of columns; of more of them, every second or third is labelled."""
MOST_LETTERS = 60
"""Of the labels of columns side by side; more of them stand at an angle."""
DASHES = ("-", "--", ":")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # publishers refuse type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mergekit-lowrank",
}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""The same figure is the same file on every day."""
MATPLOTLIB_IS_MISSING = (
    "images are drawn with the package matplotlib, which is not installed: pip install 'mergekit-lowrank[report]'."
)


def write_image(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path's suffix names: ``.png`` (200 dpi), ``.pdf`` or ``.svg``.

    Raises:
        OutputError: matplotlib is not installed, or there is no such format.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{path}: images are written as {', '.join(SUFFIXES)}, not as '{path.suffix}'")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise OutputError(MATPLOTLIB_IS_MISSING) from error
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        canvas = Canvas(figsize=(WIDTH_INCHES, _height(figure)), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        axes.set_title(figure.title)
        _draw(figure, axes)
        canvas.savefig(path, dpi=DPI, metadata=UNDATED[path.suffix])


def _height(figure: Figure) -> float:
    match figure:
        case Heatmap():
            return max(LEAST_INCHES, FRAME_INCHES + ROW_INCHES * len(figure.rows))
        case Bars():
            return max(LEAST_INCHES, FRAME_INCHES + ROW_INCHES * len(figure.labels))
        case Lines():
            return LINES_INCHES


def _draw(figure: Figure, axes: Axes) -> None:
    match figure:
        case Heatmap():
            _draw_heatmap(figure, axes)
        case Lines():
            _draw_lines(figure, axes)
        case Bars():
            _draw_bars(figure, axes)


def _draw_heatmap(figure: Heatmap, axes: Axes) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    low, high = limits_of(figure)
    colours = LinearSegmentedColormap.from_list("figure", scale_of(figure))
    values = [[float("nan") if value is None else value for value in row] for row in figure.values]
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#dddddd")  # where there is nothing
    step = -(-len(figure.columns) // MOST_LABELS)
    labels = figure.columns[::step]
    is_tight = sum(map(len, labels)) > MOST_LETTERS
    places = range(0, len(figure.columns), step)
    axes.set_xticks(places, labels, rotation=30 if is_tight else 0, ha="right" if is_tight else "center")
    axes.set_xlabel(figure.column_label)
    axes.set_yticks(range(len(figure.rows)), figure.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, label=figure.unit, pad=0.02)
    bar.outline.set_visible(False)
    if figure.is_printed:
        _print_values(figure, image, axes)


def _print_values(figure: Heatmap, image: Any, axes: Axes) -> None:
    for i, row in enumerate(figure.values):
        for j, value in enumerate(row):
            if value is not None:
                red, green, blue, _ = image.to_rgba(value)
                is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma, ITU-R BT.601
                axes.text(j, i, number(value), ha="center", va="center", color="black" if is_light else "white")


def _draw_lines(figure: Lines, axes: Axes) -> None:
    for n, series in enumerate(figure.series):
        axes.plot(
            range(1, len(series.values) + 1),
            [value if value > 0 or not figure.is_logarithmic else float("nan") for value in series.values],
            label=series.name,
            color="black" if series.is_emphasised else LINE_COLOURS[n % len(LINE_COLOURS)],
            linewidth=2.0 if series.is_emphasised else 1.2,
            linestyle=DASHES[n // len(LINE_COLOURS) % len(DASHES)],
            marker="." if len(series.values) == 1 else "",
        )
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    if figure.is_logarithmic:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _draw_bars(figure: Bars, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    places = range(len(figure.labels))
    axes.barh(places, [value or 0.0 for value in figure.values], color=LINE_COLOURS[0], height=0.7)
    for place, value, interval in zip(places, figure.values, figure.intervals, strict=False):
        if value is not None:
            axes.plot(interval, (place, place), color="black", linewidth=1.2, marker="|")
    axes.set_yticks(places, figure.labels)
    axes.invert_yaxis()
    axes.set_xlabel(figure.unit)
    axes.set_xlim(right=figure.whole)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
