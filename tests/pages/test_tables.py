"""Numbers and tables as HTML."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from mergekit_lowrank.pages import Bars, Heatmap, Lines, Series, html_table, number
from mergekit_lowrank.pages.tables import figure_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (0, "0"),
        (0.0, "0"),
        (1.0, "1"),
        (16, "16"),
        (0.123456, "0.123"),
        (-12.345, "-12.3"),
        (999.4, "999"),
        (999.9, "1,000"),
        (1234.5, "1,234"),
        (0.001, "0.001"),
        (0.000123, "1.23e-04"),
        (1.5e12, "1.50e+12"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_unit_stands_behind_the_number() -> None:
    assert (number(2.5, "%"), number(None, "%")) == ("2.5 %", "none")


def test_a_table_has_heads_and_a_caption() -> None:
    table = html_table(("name", "size"), [("a", 1), ("b", None)], caption="Files", right=("size",))
    assert "<caption>Files</caption>" in table
    assert '<th scope="col" style="text-align:right">size</th>' in table
    assert '<tr><th scope="row" style="text-align:left">a</th><td style="text-align:right">1</td></tr>' in table
    assert '<td style="text-align:right"></td>' in table


def test_cells_are_escaped_unless_they_are_markup() -> None:
    table = html_table(("<i>", "b"), [("<i>", Markup("<code>x</code>"))], caption="<i>")
    assert "<i>" not in table
    assert "<code>x</code>" in table


def test_one_column_has_no_heads_of_rows() -> None:
    assert 'scope="row"' not in html_table(("name",), [("a",)])


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        html_table(("a", "b"), [("only one",)])


def rows_of(table: str) -> int:
    return table.count("<tr>") - 1


def test_figures_are_tables_of_their_numbers() -> None:
    heatmap = figure_table(Heatmap("k", "t", "d", ("r0", "r1"), ("c0",), ((1.0,), (None,))))
    assert (rows_of(heatmap), ">r0</th>" in heatmap, ">1</td>" in heatmap, "></td>" in heatmap) == (2, True, True, True)
    lines = figure_table(Lines("k", "t", "d", "x", "y", (Series("a", (1.0, 2.0)), Series("b", (3.0,)))))
    assert (rows_of(lines), lines.count("></td>")) == (2, 1)
    bars = figure_table(Bars("k", "t", "d", ("one", "two"), (1.0, None), unit="MiB"))
    assert (rows_of(bars), ">MiB</th>" in bars) == (2, True)
