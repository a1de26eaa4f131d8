from __future__ import annotations

import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import TensorSpec, open_tensors


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    return str(caught.value)


def safetensors_bytes(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (3, 5), (2, 3, 1)])
def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    stored = torch.randn(shape).to(dtype)
    save_file({"other": torch.ones(7), "a": stored}, tmp_path / "x.safetensors")
    source = open_tensors(tmp_path / "x.safetensors")
    assert source.specs["a"] == TensorSpec(dtype, shape)
    assert source.read("a").dtype == dtype
    assert torch.equal(source.read("a"), stored)


def test_tensors_of_a_file_that_is_not_aligned_are_read(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (1 + -len(text) % 2)
    (tmp_path / "x.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + torch.tensor([1.5, -2.0]).numpy().tobytes()
    )
    assert open_tensors(tmp_path / "x.safetensors").read("a").tolist() == [1.5, -2.0]


def test_specs_are_in_the_order_of_the_data(tmp_path):
    header = {
        "z": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "m": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(16)))
    assert list(open_tensors(tmp_path / "x.safetensors").specs) == ["z", "m", "a"]


def test_many_threads_read_the_same_file(tmp_path):
    tensors = {f"t{number}": torch.full((33, 17), float(number)) for number in range(64)}
    save_file(tensors, tmp_path / "x.safetensors")
    source = open_tensors(tmp_path / "x.safetensors")
    with ThreadPoolExecutor(8) as pool:
        for key, read in zip(tensors, pool.map(source.read, tensors), strict=True):
            assert torch.equal(read, tensors[key])


def test_a_truncated_file_is_named_with_its_size(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-9])
    message = error_of(path)
    assert message.startswith(f"{path}: not a valid safetensors file")
    assert f"Found {path.stat().st_size} bytes" in message
    assert message.endswith("copy or download it again.")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        safetensors_bytes([], b""),
        safetensors_bytes({"a": 1}, b""),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(80)),
        safetensors_bytes({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "not a valid safetensors file" in error_of(tmp_path / "x.safetensors")


def test_a_type_that_torch_does_not_have_is_named(tmp_path):
    header = {"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(2)))
    assert "tensor 'a' has type F8_E8M0" in error_of(tmp_path / "x.safetensors")


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "run 'git lfs pull'" in error_of(tmp_path / "x.safetensors")


def test_a_pickle_named_safetensors_is_recognised(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "looks like a PyTorch pickle" in error_of(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    for name in ("x.safetensors", "x.bin", "x.bin.index.json"):
        assert str(tmp_path / name) in error_of(tmp_path / name)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    source = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"tensor 'a' ends after 396 of 400 bytes"):
        source.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor 'a'"):
        source.read("a")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_old_and_new_are_read(tmp_path, zipped):
    stored = {"a": torch.randn(3, 2, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.randn(2, 3))}
    torch.save(stored, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    source = open_tensors(tmp_path / "x.bin")
    assert source.files == (tmp_path / "x.bin",)
    assert list(source.specs) == ["a", "b"]
    assert torch.equal(source.read("a"), stored["a"])
    assert torch.equal(source.read("b"), stored["b"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "x.bin", _use_new_zipfile_serialization=zipped)
    message = error_of(tmp_path / "x.bin")
    assert "wants to run code ('posix.mkdir')" in message
    assert "Convert it to safetensors" in message
    assert not Path("pwned").exists()


def test_a_plain_pickle_is_refused_without_being_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.bin").write_bytes(pickle.dumps({"a": Evil()}))
    assert "Nothing in it was run" in error_of(tmp_path / "x.bin")
    assert not Path("pwned").exists()


def test_a_truncated_pickle_is_named(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    assert re.search("not a valid PyTorch file .*Copy or download it again", error_of(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(1)], "holds a list; expected a dictionary of tensors"),
        ({"state_dict": {"a": torch.ones(1)}}, "entry 'state_dict' is a dict; expected tensors by name only"),
        ({3: torch.ones(1)}, "entry 3 is a Tensor; expected tensors by name only"),
        ({"a": torch.ones(2, 2).to_sparse()}, "tensor 'a' is sparse, quantised or without data"),
    ],
)
def test_a_pickle_of_something_else_is_named(tmp_path, content, expected):
    torch.save(content, tmp_path / "x.bin")
    assert expected in error_of(tmp_path / "x.bin")


def write_shards(path: Path, weight_map: object, suffix: str = "safetensors") -> Path:
    save_file({"b": torch.ones(2), "c": torch.zeros(1)}, path / "1.safetensors")
    torch.save({"a": torch.full((3,), 2.0)}, path / "2.bin")
    index = path / f"adapter_model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


GOOD_MAP = {"a": "2.bin", "b": "1.safetensors", "c": "1.safetensors"}


def test_shards_are_read_as_one(tmp_path):
    index = write_shards(tmp_path, GOOD_MAP)
    source = open_tensors(index)
    assert source.files == (index, tmp_path / "1.safetensors", tmp_path / "2.bin")
    assert list(source.specs) == ["b", "c", "a"]
    assert source.read("a").tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "name", ["../1.safetensors", "/etc/passwd", "..", ".", "", "sub/1.safetensors", "..\\1.bin", "a\0.bin"]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path, name):
    message = error_of(write_shards(tmp_path, {**GOOD_MAP, "a": name}))
    assert "lies outside the directory" in message or "neither" in message


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({**GOOD_MAP, "a": "3.bin"}, "shard '3.bin' is missing"),
        ({**GOOD_MAP, "a": "passwd"}, "shard 'passwd' is neither a .safetensors nor a .bin file"),
        ({**GOOD_MAP, "d": "2.bin"}, "tensor 'd' should be in '2.bin', which does not hold it"),
        (
            {"a": "2.bin", "b": "1.safetensors"},
            "'1.safetensors' holds tensor 'c', which the index does not place there",
        ),
        ({**GOOD_MAP, "a": 3}, "has no 'weight_map' from tensor names to file names"),
        (None, "has no 'weight_map' from tensor names to file names"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_named(tmp_path, weight_map, expected):
    assert expected in error_of(write_shards(tmp_path, weight_map))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_an_index_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "x.bin.index.json").write_bytes(content)
    assert "not readable as JSON" in error_of(tmp_path / "x.bin.index.json")
