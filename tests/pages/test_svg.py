"""Figures as SVG: every number drawn once, in its place and in its colour."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergekit_lowrank.pages import Bars, Heatmap, Lines, Series, svg
from mergekit_lowrank.pages.colours import limits_of

VALUES = st.floats(-1e30, 1e30)


def heatmap(*values: tuple[float | None, ...], **changes: Any) -> Heatmap:
    rows, columns = len(values), len(values[0]) if values else 0
    plain = {
        "key": "own",
        "title": "Title",
        "description": "What it is.",
        "rows": tuple(f"row {index}" for index in range(rows)),
        "columns": tuple(map(str, range(columns))),
        "values": values,
    }
    return Heatmap(**(plain | changes))


def lines(*values: tuple[float, ...], **changes: Any) -> Lines:
    series = tuple(Series(f"s{index}", own) for index, own in enumerate(values))
    return Lines("own", "Title", "What it is.", "k", "value", series, **changes)


def tree(figure: Any) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{svg(figure)}</div>")


def cells(figure: Heatmap) -> list[ElementTree.Element]:
    return [own for own in tree(figure).iter("rect") if "data-t" in own.attrib]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [own / 12.92 if own <= 0.04045 else ((own + 0.055) / 1.055) ** 2.4 for own in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_cell_has_its_place_its_colour_and_its_number() -> None:
    own = cells(heatmap((0.0, 1.0), unit="%", column_label="layer"))
    assert [cell.attrib["data-t"] for cell in own] == ["layer 0: 0 %", "layer 1: 1 %"]
    assert [cell.attrib["fill"] for cell in own] == ["#440154", "#fde725"]
    assert float(own[1].attrib["x"]) - float(own[0].attrib["x"]) > float(own[0].attrib["width"])


def test_a_column_without_a_name_is_not_told() -> None:
    assert cells(heatmap((2.0,), columns=("-",), column_label="layer"))[0].attrib["data-t"] == "2"


def test_colours_between_two_steps_are_between_them() -> None:
    low, middle, high = (cell.attrib["fill"] for cell in cells(heatmap((0.0, 1 / 18, 1 / 9), limits=(0.0, 1.0))))
    assert (low, high) == ("#440154", "#482878")
    assert middle == "#461466"


def test_both_sides_of_a_centre_are_told_apart() -> None:
    colours = [cell.attrib["fill"] for cell in cells(heatmap((-1.0, 0.0, 2.0), centre=0.0))]
    assert (colours[1], colours[2]) == ("#f7f7f7", "#2166ac")
    assert colours[0] not in colours[1:]


def test_colours_reach_over_a_span_at_least() -> None:
    assert limits_of(heatmap((0.01, -0.02), centre=0.0, span=(-0.1, 0.1))) == (-0.1, 0.1)
    assert limits_of(heatmap((0.01, -0.5), centre=0.0, span=(-0.1, 0.1))) == (-0.5, 0.5)
    assert limits_of(heatmap((16.0, 40.0), span=(10.0, 20.0))) == (10.0, 40.0)


def test_what_is_missing_is_hatched_and_named_in_the_legend() -> None:
    drawn = svg(heatmap((1.0, None)))
    assert (drawn.count('class="missing"'), drawn.count("data-t")) == (1, 1)
    assert "</span>none" in drawn
    assert "</span>none" not in svg(heatmap((1.0, 2.0)))


def test_one_number_everywhere_needs_no_scale() -> None:
    assert "16 in all cells" in svg(heatmap((16.0, 16.0)))


def test_printed_numbers_are_short_and_never_minus_zero() -> None:
    own = heatmap((1.0, -0.0001, 0.12345, 1234.5), is_printed=True)
    texts = [text.text for group in tree(own).iter("g") if "data-row" in group.attrib for text in group.iter("text")]
    assert texts == ["1", "0.000", "0.123", "1,234.5"]


@given(st.floats(0, 1), st.booleans())
def test_printed_numbers_stand_out_from_their_cells(value: float, has_centre: bool) -> None:
    own = heatmap((value,), limits=(0.0, 1.0), centre=0.5 if has_centre else None, is_printed=True)
    fill, text = re.search(r'fill="(#\w+)".*?fill:(#\w+)', svg(own)).groups()
    high, low = sorted((luminance(fill), {"#000": 0.0, "#fff": 1.0}[text]), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("count", [1, 40, 200])
def test_names_of_columns_do_not_touch(count: int) -> None:
    heads = list(tree(heatmap(tuple(range(count)))).iter("text"))
    places = [float(own.attrib["x"]) for own in heads]
    assert all(after - before > 6 * len(heads[-1].text) for before, after in pairwise(places))


@given(st.lists(st.lists(st.none() | VALUES, min_size=2, max_size=2).map(tuple), max_size=3), st.booleans())
def test_every_heat_map_is_drawn(values: list[tuple[float | None, ...]], has_centre: bool) -> None:
    own = heatmap(*values, centre=0.0 if has_centre else None)
    assert len(cells(own)) == sum(value is not None for row in values for value in row)


def path(figure: Lines, index: int = 0) -> str:
    return [own for own in tree(figure).iter("path") if own.attrib["class"].startswith("line")][index].attrib["d"]


def test_larger_numbers_stand_higher_and_later_ones_further_right() -> None:
    places = re.findall(r"([\d.]+) ([\d.]+)", path(lines((1.0, 3.0, 2.0))))
    (x1, y1), (x2, y2), (x3, y3) = [(float(x), float(y)) for x, y in places]
    assert x1 < x2 < x3
    assert y2 < y3 < y1


def test_zero_is_on_an_axis_that_is_not_logarithmic() -> None:
    for value in (-5.0, 5.0):
        ticks = [text.text for text in tree(lines((value, value))).iter("text") if text.attrib.get("x") == "46"]
        assert {"0", f"{value:g}"} <= set(ticks)


def test_equal_ratios_are_equal_lengths_on_a_logarithmic_axis() -> None:
    ys = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path(lines((100.0, 10.0, 1.0), is_logarithmic=True)))]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.11)


def test_what_is_not_above_zero_is_a_gap_on_a_logarithmic_axis() -> None:
    assert path(lines((1.0, 0.0, 2.0), is_logarithmic=True)).count("M") == 2
    assert path(lines((1.0, 0.0, 2.0))).count("M") == 1


def test_lines_are_told_apart_by_more_than_colour() -> None:
    own = tree(lines(*[(1.0, 2.0)] * 12))
    styles = [line.attrib["class"] for line in own.iter("path") if line.attrib["class"].startswith("line")][:12]
    assert len(set(styles[:9])) == 9
    strong = Lines("own", "t", "d.", "k", "v", (Series("merged", (1.0,), is_emphasised=True),))
    assert "line strong" in svg(strong)


@example(values=[(5e-324, 1e-320)], is_logarithmic=True)
@example(values=[(5e-324,)], is_logarithmic=False)
@example(values=[()], is_logarithmic=False)
@given(st.lists(st.lists(VALUES, max_size=5).map(tuple), max_size=3), st.booleans())
def test_every_plot_is_drawn_within_its_frame(values: list[tuple[float, ...]], is_logarithmic: bool) -> None:
    own = tree(lines(*values, is_logarithmic=is_logarithmic))
    for line in own.iter("path"):
        for x, y in re.findall(r"([\d.]+) ([\d.]+)", line.attrib["d"]):
            assert 0 <= float(x) <= 380
            assert 0 <= float(y) <= 230
    assert "nan" not in ElementTree.tostring(own, "unicode")


def bars(*values: float | None, **changes: Any) -> Bars:
    return Bars("own", "Title", "What it is.", tuple(f"b{n}" for n in range(len(values))), values, **changes)


def widths(figure: Bars) -> list[tuple[str, str]]:
    drawn = [own for own in tree(figure).iter("rect") if own.attrib["class"] == "bar"]
    return [(own.attrib["x"], own.attrib["width"]) for own in drawn]


def test_bars_are_shares_of_the_longest() -> None:
    assert widths(bars(1.0, 4.0)) == [("0.00%", "25.00%"), ("0.00%", "100.00%")]


def test_bars_below_zero_reach_to_the_left_of_it() -> None:
    assert widths(bars(-1.0, 3.0)) == [("0.00%", "25.00%"), ("25.00%", "75.00%")]


def test_a_bar_without_a_number_is_none() -> None:
    own = bars(None, 0.0, unit="MiB")
    assert widths(own) == [("0.00%", "0.00%")]
    assert [text.text for text in tree(own).iter("text")] == ["b0", "none", "b1", "0 MiB"]


def test_intervals_are_drawn_within_the_frame() -> None:
    own = tree(bars(1.0, intervals=((0.5, 2.0),)))
    whiskers = [(line.attrib["x1"], line.attrib["x2"]) for line in own.iter("line")]
    assert whiskers == [("25.00%", "100.00%"), ("25.00%", "25.00%"), ("100.00%", "100.00%")]


@given(st.lists(st.none() | VALUES, max_size=4))
def test_every_bar_is_drawn(values: list[float | None]) -> None:
    assert len(widths(bars(*values))) == sum(value is not None for value in values)


@pytest.mark.parametrize("figure", [heatmap((1.0,)), lines((1.0,)), bars(1.0)])
def test_a_drawing_says_what_it_is_and_can_be_reached(figure: Any) -> None:
    own = next(element for element in tree(figure).iter("svg"))
    assert (own.attrib["role"], own.attrib["aria-label"]) == ("img", "Title. What it is.")
    assert own.attrib.get("tabindex", "0") == "0"


def test_names_are_escaped() -> None:
    word = "<b>&\"'"
    for own in (
        heatmap((1.0,), title=word, rows=(word,), columns=(word,), column_label=word, unit=word),
        Lines("k", word, word, word, word, (Series(word, (1.0,)),)),
        Bars("k", word, word, (word,), (1.0,), unit=word),
    ):
        assert "<b>" not in svg(own)
        tree(own)


def test_a_bar_of_a_whole_is_as_long_as_its_share() -> None:
    own = Bars("b", "Share", "Of each.", ("a", "b"), (49.0, 51.0), "%", whole=100.0)
    widths = [bar.attrib["width"] for bar in tree(own).iter("rect") if bar.attrib["class"] == "bar"]
    assert widths == ["49.00%", "51.00%"]
