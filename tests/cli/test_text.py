"""Tables and progress."""

from __future__ import annotations

import io
import sys

from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.cli.tables import aligned, fields, one_line, spans
from mergekit_lowrank.events import MergeFinished, MergeStarted, ModuleMerged, Notice, SurveyRound
from mergekit_lowrank.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_columns_are_aligned():
    assert list(aligned(("name", "count", "x"), [("a", "10", "y"), ("long", "2", "z")], right=["count"])) == [
        "name  count  x",
        "a        10  y",
        "long      2  z",
    ]


def test_on_a_terminal_the_last_column_is_wrapped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    lines = list(fields([("name", "word " * 12)]))
    assert lines == ["name  word word word word word word word", "      word word word word word"]


def test_text_of_files_is_made_safe_to_print():
    assert one_line("a\nb\x1b[2J\u2028c") == "a b?[2J c"


def test_spans_of_numbers():
    assert spans([7, 0, 1, 2, 1]) == "0-2,7"
    assert spans([]) == ""


@given(st.lists(st.integers(0, 50)))
def test_spans_hold_every_number_once(numbers):
    held = []
    for span in filter(None, spans(numbers).split(",")):
        first, _, last = span.partition("-")
        held += range(int(first), int(last or first) + 1)
    assert held == sorted(set(numbers))


def test_each_survey_round_and_the_merge_have_their_own_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar()
    events = [MergeStarted(2, 10), *(SurveyRound("m", n, 2) for n in (1, 1, 2, 2)), *[ModuleMerged("m", 1, 0.1)] * 2]
    for event in [*events, MergeFinished("out", 1.0)]:
        bar.handle(event)
    bar.close()
    bar.close()
    shown = terminal.getvalue()
    assert [shown.index(title) for title in ("survey, round 1", "survey, round 2")] == sorted(
        [shown.index("survey, round 1"), shown.index("survey, round 2")]
    )
    assert "merge" in shown
    assert shown.endswith("\r")


def test_off_a_terminal_no_bar_is_shown(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar()
    bar.handle(MergeStarted(2, 10))
    bar.handle(ModuleMerged("m", 1, 0.1))
    bar.close()
    assert stream.getvalue() == ""


def test_a_notice_is_a_line_on_a_terminal_or_not(monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = ProgressBar()
        bar.handle(MergeStarted(2, 10))
        bar.handle(Notice("2 of 4 are there already"))
        bar.handle(ModuleMerged("m", 1, 0.1))
        bar.close()
        assert "2 of 4 are there already\n" in stream.getvalue()
