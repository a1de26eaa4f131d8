from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import SafetensorsStream, open_tensors

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
    stream.close()


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
    with pytest.raises(OutputError, match=r"the disk is full: [\d,]+ bytes are needed, [\d,]+ are free"):
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))})


def test_free_space_is_compared_where_it_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    with pytest.raises(OutputError, match="the disk is full"):
        SafetensorsStream(tmp_path / "x.safetensors", {"a": (torch.float32, (1 << 50,))})
    assert torch.equal(load_file(write(tmp_path / "y.safetensors", {"a": torch.ones(2)}))["a"], torch.ones(2))


def test_a_system_without_posix_fallocate_is_served(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(load_file(write(tmp_path / "y.safetensors", {"a": torch.ones(2)}))["a"], torch.ones(2))


def test_a_disk_that_fails_while_writing_is_named(tmp_path, monkeypatch):
    with SafetensorsStream(
        tmp_path / "x.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    ) as stream:
        stream.write("b", torch.ones(2))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing(errno.EIO))
            with pytest.raises(OutputError, match=r"x\.safetensors: cannot be written: Input/output error"):
                stream.write("a", torch.ones(2))


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 2)}
    loaded = load_file(write(tmp_path / "x.safetensors", tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        SafetensorsStream(tmp_path / "missing" / "x.safetensors", {})
