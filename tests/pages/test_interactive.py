from __future__ import annotations

import html
import json
import re
import sys

import pytest

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.pages.interactive import interactive, with_plotly

from .figures import BARS, FIGURES, LINES, MAP, PAIRS


def plot_of(figure):
    (data,) = re.findall(r'data-plot="([^"]*)"', interactive(figure))
    return json.loads(html.unescape(data))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_every_figure_is_one_that_plotly_knows(figure):
    objects = pytest.importorskip("plotly.graph_objects")
    drawn = objects.Figure(plot_of(figure))  # names and values of all properties are checked
    assert len(drawn.data) == (len(figure.series) if figure is LINES else 1)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_a_figure_is_told_to_those_who_do_not_see_it(figure):
    (label,) = re.findall(r'role="img" aria-label="([^"]*)"', interactive(figure))
    assert html.unescape(label) == f"{figure.title}. {figure.description}"


def test_a_heat_map_has_its_numbers_and_holes():
    (trace,) = plot_of(MAP)["data"]
    assert trace["z"] == [[1.0, None, 3.0], [2.0, 2.5, None]]
    assert (trace["x"], trace["y"]) == (["0", "1", "none"], ["q_proj", "v_proj"])
    assert (trace["zmin"], trace["zmax"]) == (1.0, 3.0)
    assert "<b>%{z:.4~g} %</b>" in trace["hovertemplate"]


def test_colours_of_a_heat_map_are_even_around_its_centre():
    (trace,) = plot_of(PAIRS)["data"]
    assert (trace["zmin"], trace["zmax"]) == (-1.0, 1.0)
    assert trace["text"] == [["1", "0.25", ""], ["0.25", "1", "-0.5"], ["", "-0.5", "1"]]
    steps = [step for step, _ in trace["colorscale"]]
    assert (steps[0], steps[len(steps) // 2], steps[-1]) == (0, 0.5, 1)


def test_on_a_logarithmic_axis_zeros_are_left_out():
    plot = plot_of(LINES)
    assert plot["layout"]["yaxis"]["type"] == "log"
    assert plot["data"][0]["x"] == [1, 2, 3]
    assert plot["data"][0]["y"] == [4.0, 1.0, None]


def test_lines_differ_in_more_than_their_colour():
    series = tuple(LINES.series[0] for _ in range(13))
    lines = plot_of(type(LINES)("many", "t", "d", "x", "y", series))["data"]
    looks = [(line["line"]["color"], line["line"]["dash"]) for line in lines]
    assert len(set(looks)) == 13
    assert plot_of(LINES)["data"][-1]["line"]["width"] > lines[0]["line"]["width"]


def test_intervals_reach_from_their_low_to_their_high_end():
    (trace,) = plot_of(BARS)["data"]
    assert trace["x"] == [10.0, None, 30.0]
    assert trace["error_x"]["array"] == [2.0, 0.0, 1.0]
    assert trace["error_x"]["arrayminus"] == [2.0, 0.0, 1.0]


def test_plotly_stands_once_in_the_page_and_asks_nobody():
    pytest.importorskip("plotly")
    page = with_plotly("<html><body><p>a</body> in code</p></body></html>")
    assert page.startswith("<html><body><p>a</body> in code</p><script>")
    assert page.endswith("</script>\n</body></html>")
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_without_plotly_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OutputError, match=r"pip install 'mergekit-lowrank\[report\]'"):
        with_plotly("<body></body>")
