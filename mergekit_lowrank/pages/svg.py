"""Figures drawn as SVG: small, sharp at any size, and readable without a script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from sys import float_info

from markupsafe import Markup

from mergekit_lowrank.pages.colours import limits_of, scale_of
from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines, Series
from mergekit_lowrank.pages.tables import number

__all__ = ["svg"]

# All lengths are in CSS pixels.
ROW_HEIGHT = 22
PRINTED_WIDTH, PRINTED_HEIGHT = 62, 34
NARROWEST, WIDEST = 11, 38
USUAL_WIDTH = 760
"""What the cells of a row take together, as far as their limits allow."""
LETTER = 6.6
"""Width of a letter of a label, about."""
LONGEST_LABEL = 20
SLANT = 0.6
"""Sine of the angle at which long names of columns stand."""
GAP = 1
NAMELESS = "-"
"""The name of a column that has none."""
PRINTED_FINE = 10
"""Numbers from here on are printed with one decimal."""

LEAST_WRITTEN_OUT = 1e-3
"""Ticks below are powers, such as 1e-4."""
PLOT_WIDTH, PLOT_HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
TICKS = 5
LEAST_LENGTH = 1e-9
"""An axis that would be shorter is given a length of 1."""
FINE_DECADES = 2
"""On a logarithmic axis with fewer decades, 2 and 5 are marked too."""

BAR_STEP, BAR_TOP, BAR_HEIGHT = 38, 20, 10
INTERVAL_REACH = 3


def svg(figure: Figure) -> Markup:
    """A figure as HTML around an ``<svg>``: a legend beside it where colours mean something."""
    match figure:
        case Heatmap():
            return _heatmap(figure)
        case Lines():
            return _lines(figure)
        case Bars():
            return _bars(figure)


def _heatmap(figure: Heatmap) -> Markup:
    columns, shades = len(figure.columns), _Shades(figure)
    width, height = (PRINTED_WIDTH, PRINTED_HEIGHT) if figure.is_printed else (_cell_width(columns), ROW_HEIGHT)
    top = _head_height(figure.columns, width)
    rows = Markup("").join(
        Markup('<g data-row="{}" transform="translate(0 {})">{}</g>').format(
            name, top + index * height, _cells(figure, figure.values[index], shades, width, height)
        )
        for index, name in enumerate(figure.rows)
    )
    return Markup(
        '<div class="heatmap">{names}<div class="scroll"><svg class="cells" role="img" tabindex="0" width="{full}" '
        'height="{tall}" aria-label="{title}. {description}">{heads}{rows}</svg></div></div>'
        "{legend}"
    ).format(
        names=_names(figure, top, height),
        full=columns * width + (top if _is_slanted(figure.columns, width) else 0),
        tall=top + height * len(figure.rows),
        title=figure.title,
        description=figure.description,
        heads=_heads(figure, top, width),
        rows=rows,
        legend=_legend(figure, shades),
    )


def _names(figure: Heatmap, top: int, height: int) -> Markup:
    """The names of the rows, which stay where they are when the cells are scrolled."""
    names = Markup("").join(
        Markup('<span style="line-height:{}px" title="{}"><bdi>{}</bdi></span>').format(height, name, name)
        for name in figure.rows
    )
    return Markup(
        '<div class="names" aria-hidden="true"><span class="corner" style="height:{}px">{}</span>{}</div>'
    ).format(top, figure.column_label, names)


def _cell_width(columns: int) -> int:
    return max(NARROWEST, min(WIDEST, USUAL_WIDTH // max(columns, 1)))


def _is_slanted(names: Sequence[str], width: int) -> bool:
    return not all(name.isdigit() or len(name) == 1 for name in names) and _widest(names) > width


def _widest(names: Sequence[str]) -> float:
    return LETTER * max((len(_shortened(name)) for name in names), default=0)


def _head_height(names: Sequence[str], width: int) -> int:
    return ROW_HEIGHT + (math.ceil(_widest(names) * SLANT) if _is_slanted(names, width) else 0)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def _heads(figure: Heatmap, top: int, width: int) -> Markup:
    """The names of the columns: slanted where they are long, every so many of them where they are dense."""
    texts, is_slanted = [], _is_slanted(figure.columns, width)
    every = 1 if is_slanted else max(1, math.ceil((_widest(figure.columns) + LETTER) / width))
    for index, name in list(enumerate(figure.columns))[::every]:
        x, y = (index + 0.5) * width, top - 7
        turn = Markup(' transform="rotate(-37 {:g} {})"').format(x, y) if is_slanted else ""
        anchor = "start" if is_slanted else "middle"
        texts.append(
            Markup('<text x="{:g}" y="{}" text-anchor="{}"{}>{}</text>').format(x, y, anchor, turn, _shortened(name))
        )
    return Markup("").join(texts)


def _cells(figure: Heatmap, values: Sequence[float | None], shades: _Shades, width: int, height: int) -> Markup:
    """One row; a cell holds what is told of it under the pointer."""
    return Markup("").join(
        _cell(figure, column, value, shades.of(value), width, height)
        if value is not None
        else Markup('<rect class="missing" fill="none" x="{}" width="{}" height="{}"/>').format(
            column * width, width - GAP, height - GAP
        )
        for column, value in enumerate(values)
    )


def _cell(figure: Heatmap, column: int, value: float, fill: str, width: int, height: int) -> Markup:
    cell = Markup('<rect x="{}" width="{}" height="{}" fill="{}" data-t="{}{}"/>').format(
        column * width, width - GAP, height - GAP, fill, _place(figure, column), number(value, figure.unit)
    )
    if not figure.is_printed:
        return cell
    x, y = (column + 0.5) * width, height / 2 + 4
    return cell + Markup('<text x="{:g}" y="{:g}" style="fill:{}">{}</text>').format(x, y, _ink(fill), _printed(value))


def _place(figure: Heatmap, column: int) -> str:
    """What is told of a cell before its number: its column, if that has a name."""
    name = figure.columns[column]
    return "" if name == NAMELESS else f"{figure.column_label} {name}: ".lstrip()


def _printed(value: float) -> str:
    """What fits into a cell: integers whole, others to three decimals or one."""
    digits = 3 if abs(value) < PRINTED_FINE else 1
    return f"{value:,.0f}" if value == int(value) else f"{round(value, digits) + 0.0:,.{digits}f}"


class _Shades:
    """The colours of a heat map's values."""

    def __init__(self, figure: Heatmap) -> None:
        self._limits = limits_of(figure)
        self._scale = [_channels(colour) for colour in scale_of(figure)]

    def of(self, value: float) -> str:
        """``#rrggbb``, between the two steps of the scale that the value lies between."""
        low, high = self._limits
        position = min(max((value - low) / (high - low), 0.0), 1.0) * (len(self._scale) - 1)
        index = min(int(position), len(self._scale) - 2)
        pair = zip(self._scale[index], self._scale[index + 1], strict=True)
        return "#" + "".join(f"{round(a + (position - index) * (b - a)):02x}" for a, b in pair)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _ink(fill: str) -> str:
    """Black or white, whichever stands out more from a colour (WCAG 2.2, relative luminance): 4.5 : 1 at least."""
    parts = [channel / 255 for channel in _channels(fill)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def _legend(figure: Heatmap, shades: _Shades) -> Markup:
    """The colours from the lower limit to the upper one, or the only one, and what is drawn where there is nothing."""
    values = [value for row in figure.values for value in row]
    known = sorted({value for value in values if value is not None})
    if len(known) == 1:
        ramp = Markup('<span class="only" style="background:{}"></span><span>{} in all cells</span>').format(
            shades.of(known[0]), number(known[0], figure.unit)
        )
    else:
        low, high = limits_of(figure)
        ramp = Markup(
            '<span>{}</span><span class="ramp" style="background:linear-gradient(90deg,{})"></span><span>{}</span>'
        ).format(number(low, figure.unit), ",".join(scale_of(figure)), number(high, figure.unit))
    nothing = Markup('<span class="nothing"></span>none') if None in values else ""
    return Markup('<p class="legend" aria-hidden="true">{}{}</p>').format(ramp, nothing)


def _lines(figure: Lines) -> Markup:
    shown = [value for series in figure.series for value in series.values if _is_shown(figure, value)]
    y = _Axis(shown or [1.0], is_logarithmic=figure.is_logarithmic)
    longest = max([1, *(len(series.values) for series in figure.series)])
    paths = [
        Markup('<path class="{}" d="{}"/>').format(_style(figure, index), _path(figure, series, y, longest))
        for index, series in enumerate(figure.series)
    ]
    data = {"left": LEFT, "right": PLOT_WIDTH - RIGHT, "longest": longest, "x": figure.x_label}
    data["series"] = [[series.name, list(map(number, series.values))] for series in figure.series]
    return Markup(
        '<svg class="lines" role="img" tabindex="0" viewBox="0 0 {width} {height}" '
        'aria-label="{title}. {description}" data-plot="{data}">{frame}{paths}'
        '<line class="guide" y1="{top}" y2="{bottom}" visibility="hidden"/></svg><p class="legend">{legend}</p>'
    ).format(
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        title=figure.title,
        description=figure.description,
        data=json.dumps(data, separators=(",", ":")),
        frame=Markup("").join([*_y_ticks(y), *_x_ticks(longest), _labels(figure)]),
        paths=Markup("").join(paths),
        top=TOP,
        bottom=PLOT_HEIGHT - BOTTOM,
        legend=Markup("").join(
            Markup('<span><svg width="22" height="8"><path class="{}" d="M0 4H22"/></svg>{}</span>').format(
                _style(figure, index), series.name
            )
            for index, series in enumerate(figure.series)
        ),
    )


def _is_shown(figure: Lines, value: float) -> bool:
    return value > 0 or not figure.is_logarithmic


def _style(figure: Lines, index: int) -> str:
    """The class of a line: a colour and dashes of its own, or the strong one."""
    if figure.series[index].is_emphasised:
        return "line strong"
    plain = sum(not series.is_emphasised for series in figure.series[:index])
    return f"line c{plain % 6} d{plain // 3 % 3}"


def _path(figure: Lines, series: Series, y: _Axis, longest: int) -> str:
    """Through the numbers that are shown; a gap where one is not."""
    steps, pen = [], "M"
    for position, value in enumerate(series.values, start=1):
        if not _is_shown(figure, value):
            pen = "M"
            continue
        steps.append(f"{pen}{_x(position, longest):.1f} {y.place(value):.1f}")
        pen = "L"
    return "".join(steps)


def _x(position: int, longest: int) -> float:
    return LEFT + (PLOT_WIDTH - LEFT - RIGHT) * (position - 1) / max(longest - 1, 1)


class _Axis:
    """Where numbers stand between the bottom and the top of a plot.

    Args:
        values: what is shown; above 0 on a logarithmic axis.
        is_logarithmic: whether equal ratios are equal lengths.
    """

    def __init__(self, values: Sequence[float], *, is_logarithmic: bool) -> None:
        self.is_logarithmic = is_logarithmic
        known = [self._length(value) for value in values]
        zero = [] if is_logarithmic else [0.0]
        self._low, self._high = min([*zero, *known]), max([*zero, *known])
        if self._high - self._low < LEAST_LENGTH:
            self._high = self._low + 1.0

    def _length(self, value: float) -> float:
        # Numbers below float_info.min exist, and their powers of ten do not.
        return math.log10(max(value, float_info.min)) if self.is_logarithmic else value

    def place(self, value: float) -> float:
        """The y coordinate of a number."""
        share = (self._length(value) - self._low) / (self._high - self._low)
        return PLOT_HEIGHT - BOTTOM - share * (PLOT_HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        step = _round_step((self._high - self._low) / TICKS)
        if not self.is_logarithmic:
            return list(_multiples(self._low, self._high, step))
        decades = _multiples(math.floor(self._low), self._high, max(1.0, math.ceil(step)))
        factors = (1, 2, 5) if self._high - self._low < FINE_DECADES else (1,)
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        return [tick for tick in found if self._low <= math.log10(tick) <= self._high]


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten: the least of these that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= step), 10 * power)


def _multiples(low: float, high: float, step: float) -> Iterator[float]:
    first = math.ceil(low / step)
    return (index * step for index in range(first, math.floor(high / step) + 1))


def _y_ticks(y: _Axis) -> Iterator[Markup]:
    for tick in y.ticks():
        yield Markup(
            '<path class="tick" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(LEFT, y.place(tick), PLOT_WIDTH - RIGHT, LEFT - 6, y.place(tick) + 4, _tick(tick))


def _tick(value: float) -> str:
    """The number, in the few places there are beside the axis."""
    return number(value) if value == 0 or abs(value) >= LEAST_WRITTEN_OUT else f"{value:.0e}".replace("e-0", "e-")


def _x_ticks(longest: int) -> Iterator[Markup]:
    step = max(1, round(_round_step(longest / TICKS)))
    for position in [1, *range(step, longest + 1, step)] if step > 1 else range(1, longest + 1):
        yield Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            _x(position, longest), PLOT_HEIGHT - BOTTOM + 15, position
        )


def _labels(figure: Lines) -> Markup:
    return Markup(
        '<text x="{}" y="{}" text-anchor="end">{}</text>'
        '<text transform="rotate(-90)" x="{}" y="11" text-anchor="end">{}</text>'
    ).format(PLOT_WIDTH - RIGHT, PLOT_HEIGHT - 4, figure.x_label, -TOP, figure.y_label)


def _bars(figure: Bars) -> Markup:
    """Bars under their labels, in shares of the width that there is."""
    ends = [value for value in (*figure.values, figure.whole) if value is not None]
    ends += [end for interval in figure.intervals for end in interval]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    reach = high - low or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / reach

    bars = Markup("").join(_bar(figure, index, place) for index in range(len(figure.labels)))
    return Markup('<svg class="bars" role="img" width="100%" height="{}" aria-label="{}. {}">{}</svg>').format(
        BAR_STEP * len(figure.labels), figure.title, figure.description, bars
    )


def _bar(figure: Bars, index: int, place: Callable[[float], float]) -> Markup:
    value, top = figure.values[index], index * BAR_STEP
    parts = [
        Markup('<text x="0" y="{y}">{label}</text><text x="100%" y="{y}" text-anchor="end">{value}</text>').format(
            y=top + BAR_TOP - 6, label=figure.labels[index], value=number(value, figure.unit)
        ),
        Markup('<rect class="track" y="{}" width="100%" height="{}"/>').format(top + BAR_TOP, BAR_HEIGHT),
    ]
    if value is not None:
        start, end = sorted((place(0.0), place(value)))
        parts.append(
            Markup('<rect class="bar" x="{:.2f}%" y="{}" width="{:.2f}%" height="{}"/>').format(
                start, top + BAR_TOP, end - start, BAR_HEIGHT
            )
        )
    if figure.intervals:
        low, high = figure.intervals[index]
        parts.append(_whisker(place(low), place(high), top + BAR_TOP + BAR_HEIGHT // 2))
    return Markup("").join(parts)


def _whisker(low: float, high: float, y: int) -> Markup:
    return Markup("").join(
        Markup('<line class="whisker" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>').format(start, end, y - up, y + up)
        for start, end, up in ((low, high, 0), (low, low, INTERVAL_REACH), (high, high, INTERVAL_REACH))
    )
