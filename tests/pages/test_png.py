from __future__ import annotations

import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.pages.png import write_image

from .figures import BARS, FIGURES, LINES, MAP, NAMES, PAIRS

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_every_figure_is_drawn(matplotlib, tmp_path, figure):
    path = tmp_path / "figure.png"
    write_image(figure, path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] == 1360
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 3


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_same_figure_is_the_same_file(matplotlib, tmp_path, suffix):
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    for path in (one, other):
        write_image(MAP, path)
    assert one.read_bytes().startswith(MAGIC[suffix])
    assert one.read_bytes() == other.read_bytes()


def texts(tmp_path, figure):
    write_image(figure, tmp_path / "texts.svg")
    root = ElementTree.parse(tmp_path / "texts.svg")
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_names_and_printed_numbers_are_in_the_image(matplotlib, tmp_path):
    assert {"Cosines", *NAMES, "1", "0.25", "-0.5"} <= {*texts(tmp_path, PAIRS)}


def test_of_many_columns_some_are_named(matplotlib, tmp_path):
    wide = replace(MAP, columns=tuple(map(str, range(100))), values=((1.0,) * 100, (2.0,) * 100))
    assert [text for text in texts(tmp_path, wide) if text.isdigit()][:20] == [str(n) for n in range(0, 100, 5)]


def test_a_line_of_one_number_is_a_point(matplotlib, tmp_path):
    single = replace(LINES, series=LINES.series[-1:])
    write_image(single, tmp_path / "point.png")
    pixels = matplotlib.image.imread(tmp_path / "point.png")
    assert (pixels[100:500, 200:1300, :3].sum(axis=2) < 0.1).any()


def test_bars_without_a_number_have_no_interval(matplotlib, tmp_path):
    write_image(BARS, tmp_path / "all.svg")
    write_image(replace(BARS, intervals=((8.0, 12.0), (40.0, 50.0), (29.0, 31.0))), tmp_path / "other.svg")
    assert (tmp_path / "all.svg").read_text() == (tmp_path / "other.svg").read_text()


def test_the_axis_of_a_whole_ends_with_it(matplotlib, tmp_path):
    bars = replace(BARS, intervals=(), whole=100.0)
    write_image(bars, tmp_path / "whole.svg")
    assert ">100</text>" in (tmp_path / "whole.svg").read_text()


def test_what_a_program_set_in_matplotlib_changes_nothing(matplotlib, tmp_path):
    write_image(MAP, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "figure.dpi": 10}):
        write_image(MAP, tmp_path / "set.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "set.png").read_bytes()


def test_another_format_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"figure\.gif: images are written as \.png, \.pdf, \.svg, not as '\.gif'"):
        write_image(MAP, tmp_path / "figure.gif")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"pip install 'mergekit-lowrank\[report\]'"):
        write_image(MAP, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()
