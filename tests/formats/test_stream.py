from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from mergekit_lowrank.errors import CheckpointError, DiskError, OutputError
from mergekit_lowrank.formats import SafetensorsHeader, SafetensorsStream, open_tensors

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def announced(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, tensors, metadata=None):
    with SafetensorsStream(path, announced(tensors), metadata=metadata) as stream:
        for name, tensor in tensors.items():
            stream.write(name, tensor)
    return path


specs = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(FLOATS), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
)


@given(specs)
def test_what_is_written_comes_back_through_the_safetensors_library(tmp_path_factory, specs):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    path = write(tmp_path_factory.mktemp("stream") / "x.safetensors", tensors, {"format": "pt", "é": "ü"})
    loaded, ours = load_file(path), open_tensors(path)
    assert set(loaded) == set(ours.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours.read(name), tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "é": "ü"}
    assert path.stat().st_size == len(path.read_bytes())


def test_data_lie_in_the_order_given_with_wider_types_first(tmp_path):
    tensors = {"z": torch.ones(1).half(), "m": torch.ones(3), "a": torch.ones(1), "b": torch.ones(1).half()}
    assert list(open_tensors(write(tmp_path / "x.safetensors", tensors)).specs) == ["m", "a", "z", "b"]


def test_the_file_equals_that_of_the_safetensors_library(tmp_path):
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(1)}
    assert load(save(tensors)).keys() == tensors.keys()
    assert write(tmp_path / "x.safetensors", tensors).read_bytes() == save(tensors)


def test_tensors_are_written_from_several_threads_in_any_order(tmp_path):
    tensors = {f"t{number}": torch.full((number, 13), float(number)) for number in range(50)}
    with SafetensorsStream(tmp_path / "x.safetensors", announced(tensors)) as stream, ThreadPoolExecutor(8) as pool:
        list(pool.map(stream.write, reversed(tensors), reversed(tensors.values())))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_views_and_parameters_are_written_as_seen(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"t": base.T, "s": base[::2, 1::2], "p": torch.nn.Parameter(base), "e": base[:1].expand(3, 6)}
    loaded = load_file(write(tmp_path / "x.safetensors", tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_all_space_is_reserved_before_the_first_write(tmp_path):
    stream = SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (1000,))})
    assert (tmp_path / "x.safetensors").stat().st_size == stream.total_bytes >= 4000
    stream.write("a", torch.ones(1000))
    stream.finish()


@pytest.mark.parametrize(
    ("tensor", "name"),
    [(torch.ones(3), "a"), (torch.ones(2, 1), "a"), (torch.ones(2).half(), "a"), (torch.ones(2), "b")],
)
def test_a_tensor_other_than_announced_is_refused(tmp_path, tensor, name):
    with (
        pytest.raises(ValueError, match=f"tensor '{name}': announced as"),
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}) as stream,
    ):
        stream.write(name, tensor)


def test_a_tensor_cannot_be_written_twice(tmp_path):
    with SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}) as stream:
        stream.write("a", torch.ones(2))
        with pytest.raises(ValueError, match="tensor 'a' is written twice"):
            stream.write("a", torch.zeros(2))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))


def test_a_tensor_that_was_never_written_is_named_on_closing(tmp_path):
    with (
        pytest.raises(ValueError, match="2 tensors were never written, such as 'a'"),
        SafetensorsStream(tmp_path / "x.safetensors", dict.fromkeys("ba", (torch.float32, (2,)))),
    ):
        pass


def test_an_exception_inside_passes_and_leaves_the_file(tmp_path):
    with (
        pytest.raises(KeyError, match="mine"),
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}),
    ):
        raise KeyError("mine")
    assert (tmp_path / "x.safetensors").exists()


def failing(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_full_disk_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(DiskError, match=r"the disk is full: [\d,]+ bytes are needed, [\d,]+ are free") as caught:
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))})
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_free_space_is_compared_where_it_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    with pytest.raises(OutputError, match="the disk is full"):
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (1 << 50,))})
    assert torch.equal(load_file(write(tmp_path / "y.safetensors", {"a": torch.ones(2)}))["a"], torch.ones(2))


def test_a_system_without_posix_fallocate_is_served(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(load_file(write(tmp_path / "y.safetensors", {"a": torch.ones(2)}))["a"], torch.ones(2))


@pytest.mark.parametrize("advise", [None, failing(errno.EINVAL)])
def test_a_system_that_takes_no_advice_on_writing_back_is_served(tmp_path, monkeypatch, advise):
    if advise is None:
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", advise)
    tensor = torch.randn(1 << 17)
    assert torch.equal(load_file(write(tmp_path / "y.safetensors", {"a": tensor}))["a"], tensor)


def test_large_pieces_are_on_their_way_to_the_disk_at_once(tmp_path, monkeypatch):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *advice: advised.append(advice))
    tensors = {"large": torch.ones(1 << 17), "small": torch.ones(9)}
    stream = SafetensorsStream(tmp_path / "x.safetensors", announced(tensors))
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    assert advised == [(stream.header.begins["large"], 1 << 19, os.POSIX_FADV_DONTNEED)]


def test_a_disk_that_fails_while_writing_is_named(tmp_path, monkeypatch):
    with SafetensorsStream(
        tmp_path / "x.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    ) as stream:
        stream.write("b", torch.ones(2))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing(errno.EIO))
            with pytest.raises(DiskError, match=r"x\.safetensors: cannot be written: Input/output error") as caught:
                stream.write("a", torch.ones(2))
    assert caught.value.__cause__.errno == errno.EIO


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 2)}
    loaded = load_file(write(tmp_path / "x.safetensors", tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        SafetensorsStream(tmp_path / "missing" / "x.safetensors", {})


def test_the_digest_is_that_of_the_bytes_in_the_file(tmp_path):
    tensors = {"a": torch.randn(700, 1000), "b": torch.randn(5).half(), "e": torch.ones(0, 3)}
    path = tmp_path / "x.safetensors"
    with SafetensorsStream(path, announced(tensors)) as stream:
        written = {name: stream.write(name, tensor) for name, tensor in tensors.items()}
        read_back = {name: stream.digest(name) for name in tensors}
    assert written == read_back
    for name, tensor in load_file(path).items():
        assert written[name] == xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
    assert written["a"] == xxhash.xxh3_128_hexdigest(tensors["a"].numpy().tobytes())


def test_a_digest_sees_one_changed_bit(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.zeros(1000)})
    stream = SafetensorsStream.reopen(path, {"a": (torch.float32, (1000,))})
    before = stream.digest("a")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert stream.digest("a") != before


def test_rows_are_written_in_any_order(tmp_path):
    tensors = {"m": torch.randn(7, 3), "v": torch.randn(7), "t": torch.randn(7, 2, 3), "e": torch.randn(7, 0)}
    with SafetensorsStream(tmp_path / "x.safetensors", announced(tensors)) as stream:
        for name, tensor in tensors.items():
            for first, end in [(4, 7), (0, 1), (1, 4), (7, 7)]:
                stream.write_rows(name, first, tensor[first:end])
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "first", "rows", "message"),
    [
        ("m", 0, torch.ones(2, 4), "tensor 'm': announced as"),
        ("m", 0, torch.ones(2, 3).half(), "tensor 'm': announced as"),
        ("x", 0, torch.ones(2, 3), "tensor 'x': announced as None"),
        ("m", 3, torch.ones(2, 3), "tensor 'm' has 4 rows, given 2 from row 3 on"),
        ("m", -1, torch.ones(2, 3), "tensor 'm' has 4 rows, given 2 from row -1 on"),
        ("s", 0, torch.ones(1), "tensor 's' has 0 rows, given 1 from row 0 on"),
    ],
)
def test_rows_other_than_announced_are_refused(tmp_path, name, first, rows, message):
    stream = SafetensorsStream(tmp_path / "x.safetensors", {"m": (torch.float32, (4, 3)), "s": (torch.float32, ())})
    with pytest.raises(ValueError, match=message):
        stream.write_rows(name, first, rows)


def test_bytes_are_written_where_they_belong_and_nowhere_else(tmp_path):
    with SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.uint8, (4,)), "b": (torch.uint8, (2,))}) as stream:
        stream.write("b", torch.tensor([8, 9], dtype=torch.uint8))
        stream.write_bytes("a", 2, memoryview(b"\3\4"))
        stream.write_bytes("a", 0, memoryview(b"\1\2"))
        for offset, data in [(3, b"\7\7"), (-1, b"\7"), (5, b"")]:
            with pytest.raises(ValueError, match=f"given {len(data)} bytes from byte {offset} on"):
                stream.write_bytes("a", offset, memoryview(data))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["a"].tolist() == [1, 2, 3, 4]
    assert loaded["b"].tolist() == [8, 9]


def test_an_unfinished_file_is_gone_on_with(tmp_path):
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 2)}
    path = tmp_path / "x.safetensors"
    first = SafetensorsStream(path, announced(tensors), metadata={"format": "pt"})
    first.write("a", tensors["a"])
    first.abandon()
    with SafetensorsStream.reopen(path, announced(tensors), metadata={"format": "pt"}) as second:
        second.write("b", tensors["b"])
    assert path.read_bytes() == write(tmp_path / "y.safetensors", tensors, {"format": "pt"}).read_bytes()


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": (torch.float32, (3,))}, None),
        ({"a": (torch.float16, (4,))}, None),
        ({"b": (torch.float32, (2,))}, None),
        ({"a": (torch.float32, (2,))}, {"format": "pt"}),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_with(tmp_path, tensors, metadata):
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(OutputError, match=r"x\.safetensors: holds [\d,]+ bytes under another header; expected"):
        SafetensorsStream.reopen(path, tensors, metadata=metadata)


def test_a_truncated_file_is_not_gone_on_with(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OutputError, match="bytes under the same header; expected") as caught:
        SafetensorsStream.reopen(path, {"a": (torch.float32, (2,))})
    assert not isinstance(caught.value, DiskError)


def test_a_file_that_is_not_there_is_not_gone_on_with(tmp_path):
    with pytest.raises(OutputError, match=r"x\.safetensors: there is no unfinished file") as caught:
        SafetensorsStream.reopen(tmp_path / "x.safetensors", {})
    assert not isinstance(caught.value, DiskError)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_shrinks_under_the_stream_is_a_disk_error(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    stream = SafetensorsStream.reopen(path, {"a": (torch.float32, (1000,))})
    os.truncate(path, 100)
    with pytest.raises(DiskError, match="the file was truncated while it was written"):
        stream.digest("a")


def test_a_pickled_stream_goes_on_with_the_same_file_in_another_process(tmp_path):
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 2)}
    stream = SafetensorsStream(tmp_path / "x.safetensors", announced(tensors), counts=False)
    stream.write("a", tensors["a"])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(SafetensorsStream.write, stream, "b", tensors["b"]).result()
    stream.finish()
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def open_files():
    gc.collect()
    return len(list(Path("/dev/fd").iterdir()))


def test_a_copy_of_a_stream_opens_the_file_only_when_it_is_used(tmp_path):
    before = open_files()
    stream = SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}, counts=False)
    copies = [pickle.loads(pickle.dumps(stream)) for _ in range(3)]
    assert open_files() == before + 1
    for number in range(3):
        copies[number].write("a", torch.ones(2))
    assert open_files() == before + 4
    del stream, copies
    assert open_files() == before


def test_a_copy_of_a_stream_finds_the_file_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = SafetensorsStream(Path("x.safetensors"), {"a": (torch.float32, (2,))}, counts=False)
    pickled = pickle.dumps(stream)
    monkeypatch.chdir("/")
    pickle.loads(pickled).write("a", torch.ones(2))
    stream.finish()
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1]


def test_a_header_that_is_given_is_used_to_the_byte(tmp_path):
    save_file({"z": torch.ones(2), "a": torch.zeros(3).half()}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = SafetensorsHeader.read(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert header.total_bytes == (tmp_path / "x.safetensors").stat().st_size
    with SafetensorsStream(tmp_path / "y.safetensors", header) as stream:
        stream.write("a", torch.zeros(3).half())
        stream.write("z", torch.ones(2))
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_a_header_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x04" + bytes(7) + b"nope")
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            SafetensorsHeader.read(tmp_path / name)
