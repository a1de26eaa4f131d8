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
from mergekit_lowrank.formats import TensorSource, TensorSpec, open_tensors
from mergekit_lowrank.formats.tensors import TensorMapping
from mergekit_lowrank.testing.memory import held


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 0)])
@pytest.mark.parametrize("where", [slice(1, 4), slice(0, 5), slice(4, 9), slice(2, 2), slice(3, 1), slice(None)])
def test_rows_are_read_alone(tmp_path, dtype, shape, where):
    stored = torch.randn(shape).to(dtype)
    save_file({"other": torch.ones(7), "a": stored}, tmp_path / "x.safetensors")
    torch.save({"a": stored}, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        rows = open_tensors(tmp_path / name).read_rows("a", where)
        assert rows.dtype == dtype
        assert torch.equal(rows.float(), stored[where].float())


def test_a_source_reads_whole_tensors_where_it_knows_no_rows():
    class Ones(TensorSource):
        def read(self, key):
            return torch.ones(3, 2)

    assert Ones().read_rows("a", slice(1, 3)).shape == (2, 2)


def test_nothing_but_the_rows_is_held(tmp_path):
    save_file({"a": torch.ones(1024, 256)}, tmp_path / "x.safetensors")
    source = open_tensors(tmp_path / "x.safetensors")
    assert held(lambda: source.read_rows("a", slice(8, 16))).peak_bytes < 1024 * 256


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
    assert source.read_rows("a", slice(0, 99)).shape == (99,)
    with pytest.raises(CheckpointError, match=r"tensor 'a' ends after 396 of 400 bytes"):
        source.read_rows("a", slice(98, 100))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor 'a'"):
        source.read("a")
    with pytest.raises(CheckpointError, match="cannot read tensor 'a'"):
        source.read_rows("a", slice(0, 1))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that fails with EIO")
def test_an_error_of_the_disk_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    source = open_tensors(path)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"x.safetensors: cannot read tensor 'a': .*Input/output error"):
        source.read_rows("a", slice(0, 1))


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.bin.index.json"])
def test_a_pickled_source_opens_its_files_anew(tmp_path, name):
    stored = {"a": torch.arange(100_000.0)}
    save_file(stored, tmp_path / "x.safetensors")
    torch.save(stored, tmp_path / "x.bin")
    (tmp_path / "x.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    pickled = pickle.dumps(open_tensors(tmp_path / name))
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again.files[0] == tmp_path / name
    assert torch.equal(again.read("a"), stored["a"])


def test_tensors_in_memory_are_pickled_themselves():
    source = pickle.loads(pickle.dumps(TensorMapping({"a": torch.ones(3)}, where="here")))
    assert (source.files, source.shards, source.read("a").tolist()) == ((), {}, [1.0, 1.0, 1.0])


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
    assert source.shards == {tmp_path / "1.safetensors": ("b", "c"), tmp_path / "2.bin": ("a",)}
    assert source.read_rows("a", slice(1, 2)).tolist() == [2.0]
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
