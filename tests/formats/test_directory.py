"""Output directories that appear whole or not at all, whatever happens on the way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mergekit_lowrank import DiskError, MergeError, OutputError
from mergekit_lowrank.formats import (
    WORK_DIRECTORY,
    empty_directory,
    new_directory,
    partial_path,
    shared_directory,
    write_text,
    writing,
)
from mergekit_lowrank.formats import directory as module

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def kept(error):
    return "It is kept"


def fill(partial: Path, text: str = "new") -> None:
    """What a merge writes: tensors, a manifest that lists them, and what it needs to go on."""
    write_text(partial / "weights", text)
    write_text(partial / "manifest.json", json.dumps({"outputs": [{"name": "weights"}]}))
    (partial / WORK_DIRECTORY).mkdir(exist_ok=True)
    write_text(partial / WORK_DIRECTORY / "journal.jsonl", "")


def make(path: Path, text: str = "new", **options) -> None:
    with new_directory(path, **options) as partial:
        fill(partial, text)


def fail(path: Path, error: BaseException, **options) -> None:
    with new_directory(path, **options) as partial:
        fill(partial)
        raise error


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def failing(error: int):
    def call(*_, **__):
        raise OSError(error, os.strerror(error))

    return call


def test_a_directory_appears_whole_and_without_what_was_needed_on_the_way(tmp_path) -> None:
    with new_directory(tmp_path / "out") as partial:
        fill(partial)
        assert names(tmp_path) == [".out.partial"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json", "weights"]


def test_what_each_variant_needed_on_the_way_goes_too(tmp_path) -> None:
    with new_directory(tmp_path / "out") as partial:
        for variant in ("a", "b"):
            (partial / variant).mkdir()
            fill(partial / variant)
    assert [names(tmp_path / "out" / variant) for variant in ("a", "b")] == [["manifest.json", "weights"]] * 2


def test_an_error_deletes_it_and_the_parents_made_for_it(tmp_path) -> None:
    with pytest.raises(MergeError, match="oops"):
        fail(tmp_path / "a" / "b" / "out", MergeError("oops"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MergeError("the disk is full."), "the disk is full. It is kept"),
        (MergeError("two words"), "two words. It is kept"),
        (MemoryError(), "It is kept"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_an_error_after_which_it_is_kept_says_so(tmp_path, error, text) -> None:
    with pytest.raises(type(error)) as caught:
        fail(tmp_path / "a" / "out", error, keeps=kept)
    assert str(caught.value) == text
    assert names(tmp_path / "a" / ".out.partial") == [WORK_DIRECTORY, "manifest.json", "weights"]


def test_a_kept_directory_is_emptied_for_a_merge_that_does_not_resume(tmp_path) -> None:
    with pytest.raises(MergeError, match="oops"):
        fail(tmp_path / "out", MergeError("oops"), keeps=kept)
    (tmp_path / ".out.partial" / "earlier").write_text("")
    with pytest.raises(MergeError, match="oops"):
        fail(tmp_path / "out", MergeError("oops"), keeps=kept, resumes=True)
    assert "earlier" in names(tmp_path / ".out.partial")
    make(tmp_path / "out")
    assert "earlier" not in names(tmp_path / "out")


def test_emptying_follows_no_link_and_spares_the_names_given(tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("")
    ours = tmp_path / "ours"
    (ours / "kept").mkdir(parents=True)
    (ours / "link").symlink_to(tmp_path / "theirs")
    empty_directory(ours, but=("kept",))
    assert (names(ours), names(tmp_path / "theirs")) == (["kept"], ["file"])


class TestWhatIsThere:
    def test_an_existing_output_leaves_unfinished_work_alone(self, tmp_path) -> None:
        make(tmp_path / "out")
        partial_path(tmp_path / "out").mkdir()
        fill(partial_path(tmp_path / "out"))
        with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / "out"):
            pass
        assert "weights" in names(tmp_path / ".out.partial")

    def test_a_refusal_leaves_nothing_behind(self, tmp_path) -> None:
        make(tmp_path / "out")
        with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out"]

    def test_an_output_with_directories_may_be_overwritten(self, tmp_path) -> None:
        with new_directory(tmp_path / "out") as partial:
            fill(partial)
            (partial / "templates").mkdir()
            write_text(partial / "templates" / "chat.jinja", "")
            listed = [{"name": "weights"}, {"name": "templates/chat.jinja"}]
            write_text(partial / "manifest.json", json.dumps({"outputs": listed}))
        make(tmp_path / "out", overwrite=True)
        assert names(tmp_path / "out") == ["manifest.json", "weights"]

    def test_a_kill_between_the_two_renames_is_undone(self, tmp_path) -> None:
        make(tmp_path / "out", "old")
        (tmp_path / "out").rename(tmp_path / ".out.replaced")
        with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out"]
        assert (tmp_path / "out" / "weights").read_text() == "old"

    def test_a_kill_after_the_second_rename_leaves_nothing_for_long(self, tmp_path) -> None:
        make(tmp_path / "out", "old")
        shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")
        make(tmp_path / "out", overwrite=True)
        assert names(tmp_path) == ["out"]
        assert (tmp_path / "out" / "weights").read_text() == "new"


class TestLocks:
    def test_a_second_merge_is_refused_and_changes_nothing(self, tmp_path) -> None:
        with new_directory(tmp_path / "out") as partial:
            fill(partial)
            for other in (new_directory, shared_directory):
                with pytest.raises(OutputError, match="another merge is writing here"), other(tmp_path / "out"):
                    pass
            assert "weights" in names(partial)
        assert names(tmp_path / "out") == ["manifest.json", "weights"]

    def test_several_processes_may_share_a_directory(self, tmp_path) -> None:
        with shared_directory(tmp_path / "out") as one, shared_directory(tmp_path / "out") as other:
            assert one == other
            with pytest.raises(OutputError, match="another merge"), new_directory(tmp_path / "out", resumes=True):
                pass
        assert names(tmp_path) == [".out.partial"]

    def test_a_killed_process_lets_go_of_its_lock(self, tmp_path) -> None:
        partial = partial_path(tmp_path / "out")
        partial.mkdir()
        with subprocess.Popen([sys.executable, "-c", HOLDER, partial], stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(OutputError, match="another merge is writing here"):
                make(tmp_path / "out")
            holder.send_signal(signal.SIGKILL)
        make(tmp_path / "out")
        assert names(tmp_path) == ["out"]

    def test_a_lock_on_a_directory_that_has_become_the_output_is_no_lock(self, tmp_path, monkeypatch) -> None:
        real = fcntl.flock

        def finished_meanwhile(handle, kind):
            partial_path(tmp_path / "out").rename(tmp_path / "out")
            real(handle, kind)

        monkeypatch.setattr(module.fcntl, "flock", finished_meanwhile)
        with pytest.raises(OutputError, match="another merge"), new_directory(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out"]

    def test_a_file_system_without_locks_is_written_to_all_the_same(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(module.fcntl, "flock", failing(errno.ENOLCK))
        make(tmp_path / "out")
        assert names(tmp_path) == ["out"]

    def test_a_lock_that_fails_is_a_disk_error(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(module.fcntl, "flock", failing(errno.EIO))
        with pytest.raises(DiskError, match="cannot be locked: Input/output error"):
            make(tmp_path / "out")

    def test_of_many_threads_one_at_a_time_gets_in(self, tmp_path) -> None:
        inside, most, refused = [], [], []

        def enter() -> None:
            try:
                with new_directory(tmp_path / "out", overwrite=True) as partial:
                    inside.append(1)
                    most.append(len(inside))
                    fill(partial)
                    inside.pop()
            except OutputError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=enter) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(most) == {1}
        assert len(most) + len(refused) == len(threads)
        assert [text for text in refused if "another merge is writing here" not in text] == []
        assert names(tmp_path) == ["out"]


def opened_as(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names descriptors by /proc")
class TestPowerCuts:
    """Nothing is renamed before it is on the disk, and the rename is the last thing that happens to the output."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[tuple[str, str]]:
        found = []

        def recorded(name, real, path_of):
            def call(first, *others, **options):
                found.append((name, Path(path_of(first)).name))
                return real(first, *others, **options)

            return call

        monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync, opened_as))
        monkeypatch.setattr(os, "rename", recorded("rename", os.rename, str))
        monkeypatch.setattr(shutil, "rmtree", recorded("rmtree", shutil.rmtree, str))
        return found

    @pytest.mark.parametrize("replaces", [False, True])
    def test_all_is_flushed_then_the_work_is_dropped_then_comes_the_rename(self, tmp_path, calls, replaces) -> None:
        if replaces:
            make(tmp_path / "out", "old")
            calls.clear()
        with new_directory(tmp_path / "out", overwrite=replaces) as partial:
            fill(partial)
            (partial / "templates").mkdir()
            write_text(partial / "templates" / "chat.jinja", "")
            assert calls == []
        flushed = {("fsync", name) for name in ("weights", "manifest.json", "chat.jinja", "templates", ".out.partial")}
        dropped = calls.index(("rmtree", WORK_DIRECTORY))
        assert {*calls[:dropped]} == flushed
        moved = [("rename", "out"), ("rename", ".out.partial")] if replaces else [("rename", ".out.partial")]
        old = [("rmtree", ".out.replaced")]
        assert calls[dropped + 1 :] == [("fsync", ".out.partial"), *moved, ("fsync", tmp_path.name), *old]

    @pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
    def test_without_a_flush_there_is_no_rename_and_the_work_stays(self, tmp_path, monkeypatch, error) -> None:
        make(tmp_path / "out", "old")
        monkeypatch.setattr(os, "fsync", failing(error))
        with pytest.raises(DiskError, match="It is kept"):
            make(tmp_path / "out", overwrite=True, keeps=kept)
        assert (tmp_path / "out" / "weights").read_text() == "old"
        assert WORK_DIRECTORY in names(tmp_path / ".out.partial")

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "failed"), KeyboardInterrupt()])
    @pytest.mark.parametrize("at", ["out", ".out.partial"])
    def test_a_rename_that_fails_leaves_the_old_output_and_the_new_one(self, tmp_path, monkeypatch, error, at) -> None:
        make(tmp_path / "out", "old")
        real = os.rename

        def rename(source, target):
            if Path(source).name == at:
                raise error
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            make(tmp_path / "out", "new", overwrite=True)
        assert names(tmp_path) == [".out.partial", "out"]
        assert (tmp_path / "out" / "weights").read_text() == "old"
        assert (tmp_path / ".out.partial" / "weights").read_text() == "new"
        if isinstance(error, OSError):
            assert "All of it is written: rename" in str(caught.value)

    def test_a_directory_that_cannot_be_flushed_at_all_is_no_error(self, tmp_path, monkeypatch) -> None:
        real = os.fsync

        def files_only(handle):
            if opened_as(handle).is_dir():
                raise OSError(errno.EINVAL, "not here")
            real(handle)

        monkeypatch.setattr(os, "fsync", files_only)
        make(tmp_path / "out")
        assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_what_the_system_reports_is_a_disk_error_with_its_cause(tmp_path, error) -> None:
    with pytest.raises(DiskError, match=f"cannot be written: {os.strerror(error)}") as caught, writing(tmp_path):
        failing(error)()
    assert caught.value.__cause__.errno == error
