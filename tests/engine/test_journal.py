"""Journals: what was written before a crash is found again, and nothing else is."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest

from mergekit_lowrank import DiskError
from mergekit_lowrank.engine.journal import Journal, read_lines

BEGINS = {"recipe": "ties", "shape": (2, 3)}


@pytest.fixture
def journal(tmp_path) -> Journal:
    made = Journal(tmp_path / "journal.jsonl", BEGINS)
    for number in range(3):
        made.append({"number": number})
    return made


def reopened(journal: Journal, begins=BEGINS) -> list:
    return Journal(journal.path, begins).lines


def test_a_missing_journal_has_no_lines(tmp_path) -> None:
    assert list(read_lines(tmp_path / "none")) == []


def test_what_is_appended_is_found_again(journal) -> None:
    assert reopened(journal) == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert next(read_lines(journal.path)) == {"recipe": "ties", "shape": [2, 3]}


def test_numbers_and_texts_come_back_as_they_were(journal) -> None:
    entry = {"π": [0.1 + 0.2, 5e-324, 1e308, -0.0, math.inf, None, 2**60], "text": "ΔW \u2028 \n\x0b\x1c end"}
    journal.append(entry)
    found = reopened(journal)[-1]
    assert json.dumps(found) == json.dumps(entry)
    assert math.copysign(1, found["π"][3]) == -1


def test_a_dropped_journal_stays_away(journal) -> None:
    journal.drop()
    journal.append({"number": 3})
    journal.drop()
    assert list(read_lines(journal.path)) == []
    assert reopened(journal) == []


def test_a_journal_of_another_merge_is_dropped(journal) -> None:
    assert reopened(journal, {"recipe": "drm"}) == []
    assert reopened(journal) == []


@pytest.mark.parametrize("cut", [1, 5, 15, 20])
def test_half_a_line_counts_as_not_written(journal, cut) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    again = Journal(journal.path, BEGINS)
    assert again.lines == [{"number": 0}, {"number": 1}]
    again.append({"number": 7})
    assert reopened(again) == [{"number": 0}, {"number": 1}, {"number": 7}]


def test_every_prefix_gives_the_lines_that_are_whole(journal) -> None:
    whole = journal.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        journal.path.write_bytes(whole[:size])
        assert len(list(read_lines(journal.path))) == sum(end <= size for end in ends)


def test_a_changed_byte_ends_the_journal_before_it(journal) -> None:
    whole = bytearray(journal.path.read_bytes())
    lines = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        journal.path.write_bytes(damaged)
        assert len(list(read_lines(journal.path))) == sum(end <= place for end in lines)


def test_threads_do_not_mix_their_lines(journal) -> None:
    def append(thread: int) -> None:
        for number in range(50):
            journal.append({"thread": thread, "text": "x" * number})

    threads = [threading.Thread(target=append, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reopened(journal)) == 3 + 8 * 50


def test_a_full_disk_is_a_disk_error_and_what_was_there_stays(journal, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DiskError, match=r"journal\.jsonl: cannot be written: No space"):
            journal.append({"number": 3})
    assert len(reopened(journal)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="No space"):
            reopened(journal)
    assert len(reopened(journal)) == 3


def test_a_journal_that_cannot_be_read_is_a_disk_error(tmp_path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(DiskError, match="cannot be read"):
        Journal(tmp_path / "journal.jsonl", BEGINS)
