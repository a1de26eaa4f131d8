from __future__ import annotations

import errno
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.lowrank import DenseUpdate, StreamedUpdate, densify, empty, scratch_space

CPU = torch.device("cpu")
MAPS = Path("/proc/self/maps")

needs_proc = pytest.mark.skipif(not MAPS.exists(), reason="no /proc")


def files_of(directory: Path) -> int:
    """How many mapped files without a name lie in the directory."""
    found = [line for line in MAPS.read_text().splitlines() if str(directory) in line]
    assert all(line.endswith("(deleted)") for line in found)
    return len(found)


def made(rows: int = 300, columns: int = 200, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty((rows, columns), dtype, CPU)


@needs_proc
def test_what_is_above_the_limit_is_a_file_without_a_name_and_the_rest_is_memory(tmp_path: Path) -> None:
    outside = made()
    with scratch_space(tmp_path, 300 * 200 * 4):
        at_limit, above = made(), made(301)
        assert files_of(tmp_path) == 1
    assert (outside.shape, at_limit.shape, above.shape) == ((300, 200), (300, 200), (301, 200))
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_the_file_goes_with_the_last_view_of_its_tensor(tmp_path: Path) -> None:
    with scratch_space(tmp_path, 0):
        view = made()[10:20].T
    gc.collect()
    assert files_of(tmp_path) == 1
    view.fill_(2.0)
    assert float(view.sum()) == 4000.0
    del view
    gc.collect()
    assert files_of(tmp_path) == 0


def test_all_of_its_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, blocks = os.posix_fallocate, []

    def reserved(fd: int, offset: int, size: int) -> None:
        reserve(fd, offset, size)
        blocks.append(os.fstat(fd).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", reserved)
    with scratch_space(tmp_path, 0):
        made()
    assert len(blocks) == 1
    assert blocks[0] >= 240_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_as_memory_does(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(300, 200, dtype=dtype)
    with scratch_space(tmp_path, 0):
        tensor = made(dtype=dtype).copy_(values)
    assert (tensor.dtype, tensor.is_contiguous()) == (dtype, True)
    assert torch.equal(tensor @ tensor.T, values @ values.T)


@needs_proc
def test_the_innermost_space_counts_and_others_threads_have_none(tmp_path: Path) -> None:
    with scratch_space(tmp_path, 0):
        with scratch_space(tmp_path, 1 << 30):
            inner = made()
            assert files_of(tmp_path) == 0
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(made).result()
        assert files_of(tmp_path) == 0
        outer = made()
        assert files_of(tmp_path) == 1
    assert inner.shape == elsewhere.shape == outer.shape


def test_nothing_has_no_file(tmp_path: Path) -> None:
    with scratch_space(tmp_path, -1):
        assert made(0).shape == (0, 200)


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_a_disk_without_space_is_an_error_that_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def refuse(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with scratch_space(tmp_path, 0), pytest.raises(OutputError, match=f"{says}.*240000 bytes.*execution.memory"):
        made()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with scratch_space(tmp_path / "none", 0), pytest.raises(OutputError, match="No such file"):
        made()


@pytest.mark.parametrize("missing", [True, False], ids=["no such call", "a file system that refuses it"])
def test_space_is_taken_by_zeros_where_it_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    def refuse(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if missing:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with scratch_space(tmp_path, 0):
        tensor = made(1200, 300)  # not a whole number of chunks
    assert not tensor.any()
    assert float(tensor.fill_(1.0).sum()) == 360_000.0


@needs_proc
def test_scaled_and_copied_dense_updates_are_in_scratch_space(tmp_path: Path) -> None:
    delta = torch.randn(30, 20)
    with scratch_space(tmp_path, 0):
        scaled = DenseUpdate(delta).scaled(0.3)
        copied = densify(StreamedUpdate.of(delta))
    assert files_of(tmp_path) == 2
    assert torch.equal(scaled.delta, delta * 0.3)
    assert torch.equal(copied, delta)
