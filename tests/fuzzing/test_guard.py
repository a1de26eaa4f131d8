from __future__ import annotations

import itertools
import os
from contextlib import suppress
from pathlib import Path

import pytest

from mergekit_lowrank.errors import CheckpointError
from tests.fuzzing.guard import TooLong, Trespass, guard
from tests.fuzzing.running import Fuzzer


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    for path in (tmp_path / "own" / "file", tmp_path / "other"):
        path.write_text("x")
    return tmp_path / "own"


def test_files_of_the_case_may_be_read(own: Path) -> None:
    with guard().watching([own], 60):
        assert (own / "file").read_text() == "x"
    assert guard().trespasses == []


@pytest.mark.parametrize("path", ["../other", "/etc/passwd"])
def test_no_other_file_may_be_opened(own: Path, path: str) -> None:
    with pytest.raises(Trespass, match="opens"), guard().watching([own], 60):
        (own / path).read_text()


def test_a_trespass_that_is_swallowed_is_noted(own: Path) -> None:
    with guard().watching([own], 60), suppress(BaseException):
        (own / "../other").read_text()
    assert len(guard().trespasses) == 1


def test_nothing_may_be_written(own: Path) -> None:
    with pytest.raises(Trespass, match="writes"), guard().watching([own], 60):
        (own / "new").write_text("x")


def test_no_code_may_be_run(own: Path) -> None:
    with pytest.raises(Trespass, match=r"os\.system"), guard().watching([own], 60):
        os.system(f"touch {own / 'ran'}")
    assert not (own / "ran").exists()


def test_no_package_may_be_loaded(own: Path) -> None:
    with pytest.raises(Trespass, match="imports antigravity"), guard().watching([own], 60):
        __import__("antigravity")


def test_what_goes_on_for_ever_is_stopped(own: Path) -> None:
    with pytest.raises(TooLong), guard().watching([own], 0.05):
        all(True for _ in itertools.count())  # in Python: signals wait for the end of a call in C


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        fuzzer = Fuzzer(tmp_path / name, seed=3)
        kept = []
        for number in range(10):
            fuzzer.case("sharded", number)
            kept.append({p.name: p.read_bytes() for p in fuzzer.keep(tmp_path / f"{name}{number}").iterdir()})
        found.append(kept)
    assert found[0] == found[1]


def test_an_error_of_another_kind_is_a_failure(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    lora = fuzzer.targets["lora"]

    def reads(error: Exception) -> str | None:
        def read(_: Path) -> None:
            raise error

        fuzzer.targets["lora"] = type(lora)("lora", lora.samples, read)
        return fuzzer.case("lora", 0).failure

    assert reads(CheckpointError("damaged")) is None
    assert reads(ValueError("oops")) == "ValueError: oops"
