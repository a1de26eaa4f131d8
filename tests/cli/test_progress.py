"""What progress looks like on a terminal, in a pipe and in a notebook."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import types

import pytest

from mergekit_lowrank import progress
from mergekit_lowrank.events import MergeResumed, MergeStarted, ModuleMerged, Notice, SurveyRound
from mergekit_lowrank.progress import ProgressBar

from .builders import run


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests turn: a list with the time in it."""
    hands = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: hands[0])
    return hands


def follow(clock, modules, *, seconds_each, after=()):
    bar = ProgressBar()
    for event in (MergeStarted(modules, 0), *after):
        bar.handle(event)
    for _ in range(modules - sum(event.finished for event in after)):
        clock[0] += seconds_each
        bar.handle(ModuleMerged("m", 1, 0.1))
    bar.close()


def test_in_a_pipe_a_short_merge_says_nothing(clock, capsys):
    follow(clock, 40, seconds_each=0.1)
    assert capsys.readouterr().err == ""


def test_in_a_pipe_every_tenth_is_a_line(clock, capsys):
    follow(clock, 200, seconds_each=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "merge: 20 of 200 modules (10 %) in 00:10, about 01:30 left"
    assert [line.split()[1] for line in lines] == [str(20 * n) for n in range(1, 11)]
    assert lines[-1] == "merge: 200 of 200 modules (100 %) in 01:40, about 00:00 left"


def test_in_a_pipe_a_long_merge_is_heard_of_every_half_minute(clock, capsys):
    follow(clock, 100, seconds_each=10)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()][:3] == ["3", "6", "9"]


def test_modules_that_were_there_already_count_but_not_for_the_time_left(clock, capsys):
    follow(clock, 20, seconds_each=10, after=[MergeResumed(15)])
    assert capsys.readouterr().err.splitlines()[0] == "merge: 17 of 20 modules (85 %) in 00:20, about 00:30 left"


def test_a_notice_does_not_make_the_count_start_again(clock, capsys):
    bar = ProgressBar()
    bar.handle(MergeStarted(4, 0))
    for event in [ModuleMerged("m", 1, 0.1)] * 2 + [Notice("by the way")] + [ModuleMerged("m", 1, 0.1)] * 2:
        clock[0] += 3
        bar.handle(event)
    assert [line[:11] for line in capsys.readouterr().err.splitlines()] == [
        "merge: 2 of",
        "by the way",
        "merge: 3 of",
        "merge: 4 of",
    ]


def test_a_round_is_called_what_it_is_for(clock, capsys):
    bar = ProgressBar()
    for number, stage in ((1, "survey"), (1, "diagnosis")):
        for _ in range(2):
            clock[0] += 6
            bar.handle(SurveyRound("m", number, 2, stage))
    told = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["survey, round 1", "diagnosis, round 1"]


def test_without_stderr_there_is_no_progress_and_no_error(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    follow(clock, 2, seconds_each=60)
    ProgressBar().handle(Notice("heard by nobody"))


def kernel(monkeypatch, config):
    shell = types.SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    # What tqdm decides when it is imported is not to stay.
    for name in ("tqdm.auto", "tqdm.autonotebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_in_a_notebook_there_is_a_bar_and_no_warning_without_widgets(clock, capsys, monkeypatch):
    kernel(monkeypatch, {"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    follow(clock, 3, seconds_each=0.2)
    shown = capsys.readouterr().err
    assert "| 0/3 [" in shown
    assert shown.endswith("\r")


def test_ipython_in_a_terminal_is_no_notebook(clock, capsys, monkeypatch):
    kernel(monkeypatch, {"TerminalIPythonApp": {}})
    follow(clock, 3, seconds_each=0.2)
    assert capsys.readouterr().err == ""


# A subprocess whose events come at chosen times, since real merges of tests are too short for lines.
FOLLOW = """
from mergekit_lowrank import progress
from mergekit_lowrank.events import MergeStarted, ModuleMerged, Notice
now = 0.0
progress.monotonic = lambda: now
bar = progress.ProgressBar()
bar.handle(MergeStarted(4, 0))
for _ in range(4):
    now += 10
    bar.handle(ModuleMerged("m", 1, 0.1))
bar.handle(Notice("done"))
bar.close()
"""


def test_a_pipe_gets_lines_without_carriage_returns():
    followed = subprocess.run([sys.executable, "-c", FOLLOW], capture_output=True, timeout=120, check=True)
    assert followed.stdout == b""
    assert followed.stderr.splitlines()[0] == b"merge: 1 of 4 modules (25 %) in 00:10, about 00:30 left"
    assert followed.stderr.count(b"\n") == 5
    assert b"\r" not in followed.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_terminal_gets_a_bar_that_vanishes():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, "-c", FOLLOW], stderr=theirs):
        os.close(theirs)
        shown = b""
        while chunk := read(ours):
            shown += chunk
    os.close(ours)
    assert b"merge:" in shown
    assert b"| 0/4 [" in shown
    *_, last = shown.removesuffix(b"done\r\n").split(b"\r")
    assert last.strip() == b""


def read(descriptor):
    """What comes next; nothing once the other side is closed, which Linux calls an error."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_quiet_merges_have_no_progress(recipe, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    assert "merge: 4 of 4 modules (100 %)" in run("merge", recipe, "out").stderr
    assert run("merge", recipe, "quiet", "--quiet").stderr == ""


def test_what_is_left_of_a_round_is_told_from_the_modules_after_the_first(clock, capsys):
    """A round is heard of when its first module is done: how long that one took is not known."""
    bar = ProgressBar()
    for _ in range(4):
        clock[0] += 100
        bar.handle(SurveyRound("m", 1, 10, "diagnosis"))
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "diagnosis, round 1: 4 of 10 modules (40 %) in 05:00, about 10:00 left"
