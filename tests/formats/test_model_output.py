from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise, repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mergekit_lowrank.errors import CheckpointError, DiskError, OutputError
from mergekit_lowrank.formats import ModelLayout, ModelWriter, open_tensors
from mergekit_lowrank.formats import model_output as module
from mergekit_lowrank.formats.tensors import TensorMapping, TensorSource

INDEX = "model.safetensors.index.json"


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **settings))


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=40, **sizes))


def opened(directory):
    names = [INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"]
    return open_tensors(next(directory / name for name in names if (directory / name).exists()))


def companions(directory):
    return {path.name: path for path in directory.iterdir() if path.suffix == ".json" and "index" not in path.name}


def in_memory(tensors):
    return TensorMapping(tensors, where="memory")


def copied(base, out, **settings):
    """The base, written anew with nothing in it replaced."""
    source = opened(base)
    layout = ModelLayout.of(source, source.shards, **settings)
    out.mkdir()
    writer = ModelWriter(out, layout, source)
    for key in source.specs:
        writer.copy(key)
    writer.finish(companions(base))
    return out


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors_in(directory):
    source = opened(directory)
    return {key: source.read(key) for key in source.specs}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("model", [llama, bert])
@pytest.mark.parametrize("shard_size", ["1GB", "5KB"])
def test_an_untouched_model_has_the_same_bytes_in_the_same_files(tmp_path, model, shard_size):
    model().save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    base, out = contents(tmp_path / "base"), contents(copied(tmp_path / "base", tmp_path / "out"))
    indices = [json.loads(files.pop(INDEX)) for files in (base, out) if INDEX in files]
    assert out == base
    if shard_size == "5KB":
        assert len(base) > 3
        assert indices[1]["weight_map"] == indices[0]["weight_map"]
        assert indices[1]["metadata"]["total_size"] == indices[0]["metadata"]["total_size"]


def test_a_header_in_another_writers_style_is_kept(tmp_path):
    text = json.dumps(
        {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "__metadata__": {"k": "v"}}, indent=1
    )
    content = len(text).to_bytes(8, "little") + text.encode() + b"\7"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    assert contents(copied(tmp_path / "base", tmp_path / "out")) == {"model.safetensors": content}


def test_every_tensor_that_is_replaced_changes_and_no_other(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    source = opened(tmp_path / "base")
    key = "model.layers.1.self_attn.q_proj.weight"
    (tmp_path / "out").mkdir()
    writer = ModelWriter(tmp_path / "out", ModelLayout.of(source, source.shards), source)
    for other in source.specs:
        if other != key:
            writer.copy(other)
    for first in (8, 0):
        writer.write_rows(key, first, source.read(key)[first : first + 8] + 1)
    writer.finish(companions(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same_tensors(loaded, {k: v + 1 if k == key else v for k, v in model.state_dict().items()})
    shard = writer.layout.weight_map[key]
    base, out = contents(tmp_path / "base"), contents(tmp_path / "out")
    assert [name for name in base if out[name] != base[name] and name != INDEX] == [shard]


def test_tied_weights_stay_tied(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    out = copied(tmp_path / "base", tmp_path / "out")
    assert "lm_head.weight" not in opened(out).specs
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tie", [True, False])
def test_pickles_become_safetensors(tmp_path, tie):
    model = llama(tie_word_embeddings=tie)
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    out = copied(tmp_path / "base", tmp_path / "out")
    assert sorted(contents(out)) == ["config.json", "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tie


def test_shards_of_pickles_become_shards_of_safetensors(tmp_path):
    model = bert()
    model.config.save_pretrained(tmp_path / "base")
    state = model.state_dict()
    names = [f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number in range(len(state))]
    weight_map = dict(zip(state, names, strict=True))
    for name in set(names):
        torch.save({key: state[key] for key in state if weight_map[key] == name}, tmp_path / "base" / name)
    index = tmp_path / "base" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = copied(tmp_path / "base", tmp_path / "out")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(contents(out)) == ["config.json", *shards, INDEX]
    assert_same_tensors(AutoModel.from_pretrained(out).state_dict(), state)


def test_one_type_for_all_floating_tensors(tmp_path):
    model = bert()
    model.register_buffer("count", torch.tensor([3]))
    model.save_pretrained(tmp_path / "base")
    out = copied(tmp_path / "base", tmp_path / "out", out_dtype=torch.bfloat16)
    expected = {key: v.bfloat16() if v.is_floating_point() else v for key, v in model.state_dict().items()}
    assert_same_tensors(tensors_in(out), expected)
    assert AutoModel.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_the_configuration_names_the_new_type_wherever_it_named_one(tmp_path):
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "vision": None, "layers": ["é"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    source = in_memory({"a": torch.ones(2)})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    writer.copy("a")
    (tmp_path / "out").mkdir()
    writer.finish({f"out/{path.name}": path for path in tmp_path.glob("*.json")})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    writer.finish({"config.json": tmp_path / "config.json"})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == config | {"torch_dtype": "float16", "text_config": {"dtype": "float16", "n": 1}}
    assert '"é"' in text


def test_a_configuration_that_already_says_so_is_copied_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text('{"dtype":   "float16"}')
    source = in_memory({})
    out = tmp_path / "out"
    out.mkdir()
    writer = ModelWriter(out, ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    writer.finish({"config.json": tmp_path / "config.json"})
    assert (out / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_companions_keep_their_place(tmp_path):
    (tmp_path / "rag.jinja").write_bytes(b"\xff{{ x }}")
    source = in_memory({})
    out = tmp_path / "out"
    out.mkdir()
    ModelWriter(out, ModelLayout.of(source, {}), source).finish({"more/rag.jinja": tmp_path / "rag.jinja"})
    assert (out / "more" / "rag.jinja").read_bytes() == b"\xff{{ x }}"


@pytest.mark.parametrize("content", [None, "{"])
def test_a_companion_that_cannot_be_read_is_named(tmp_path, content):
    if content:
        (tmp_path / "base.json").write_text(content)
    source = in_memory({})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    with pytest.raises(CheckpointError, match=r"base\.json: cannot be read"):
        writer.finish({"config.json": tmp_path / "base.json"})


SPECS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=8,
)


def random_tensors(specs):
    return {key: torch.randint(-9, 9, tuple(shape)).to(dtype) for key, (dtype, shape) in specs.items()}


@given(SPECS, st.none() | st.integers(1, 200))
def test_layouts_keep_order_and_limits(specs, shard_bytes):
    source = in_memory(random_tensors(specs))
    layout = ModelLayout.of(source, {}, shard_bytes=shard_bytes)
    assert [key for header in layout.files.values() for key in header.specs] == list(source.specs)
    sizes = [[spec.stored_bytes for spec in header.specs.values()] for header in layout.files.values()]
    assert layout.data_bytes == sum(map(sum, sizes))
    if shard_bytes is None:
        assert list(layout.files) == ["model.safetensors"]
        return
    assert all(len(file) == 1 or sum(file) <= shard_bytes for file in sizes)
    assert all(sum(one) + two[0] > shard_bytes for one, two in pairwise(sizes))


@given(
    SPECS, st.none() | st.integers(1, 200), st.sampled_from([None, torch.float16, torch.float64]), st.integers(1, 40)
)
def test_what_a_layout_says_is_what_is_written(tmp_path_factory, specs, shard_bytes, out_dtype, chunk_bytes):
    tensors = random_tensors(specs)
    directory = tmp_path_factory.mktemp("model")
    source = in_memory(tensors)
    layout = ModelLayout.of(source, {}, shard_bytes=shard_bytes, out_dtype=out_dtype)
    writer = ModelWriter(directory, layout, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        digests = {key: writer.copy(key) for key in reversed(tensors)}
    assert digests == {key: writer.digest(key) for key in tensors}
    writer.finish()
    assert layout.total_bytes == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    expected = {k: v.to(out_dtype) if out_dtype and v.is_floating_point() else v for k, v in tensors.items()}
    found = {}
    for name in layout.files:
        found |= load_file(directory / name)
    assert_same_tensors(found, expected)
    assert all(found[key].dtype == layout.spec(key).dtype for key in found)
    if layout.index is not None:
        assert_same_tensors(tensors_in(directory), expected)


def test_shards_are_divided_anew_and_found_by_transformers(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    out = copied(tmp_path / "base", tmp_path / "out", shard_bytes=8000)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    assert 1 < len(names) < len(list((tmp_path / "base").glob("*.safetensors")))
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(out).state_dict(), model.state_dict())


def test_parameters_are_written_as_matrices(tmp_path):
    tensors = {"v": torch.randn(5), "s": torch.randn(()), "m": torch.randn(4, 3), "c": torch.randn(4, 3, 2, 2)}
    source = in_memory(tensors)
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}), source)
    writer.write_rows("v", 0, tensors["v"].reshape(1, 5))
    writer.write_rows("s", 0, tensors["s"].reshape(1, 1))
    for first, end in [(1, 4), (0, 1)]:
        writer.write_rows("m", first, tensors["m"][first:end])
        writer.write_rows("c", first, tensors["c"][first:end].flatten(1))
    writer.finish()
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("first", "rows", "message"),
    [
        (0, torch.ones(3, 4), "tensor 'm': announced as .* 3 columns; given"),
        (0, torch.ones(4), "tensor 'm': announced as .* 3 columns; given"),
        (0, torch.ones(4, 3).half(), "tensor 'm': announced as .*float32.*; given .*float16"),
        (3, torch.ones(2, 3), "tensor 'm': announced as .* given 24 bytes from byte 36 on"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, first, rows, message):
    source = in_memory({"m": torch.ones(4, 3)})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}), source)
    with pytest.raises(ValueError, match=message):
        writer.write_rows("m", first, rows)


class Watched(TensorSource):
    """A source that remembers the largest piece asked for."""

    def __init__(self, source):
        self.files, self.specs = source.files, source.specs
        self._source, self.largest_bytes = source, 0

    def read(self, key):
        return self._seen(self._source.read(key))

    def read_rows(self, key, where):
        return self._seen(self._source.read_rows(key, where))

    def _seen(self, tensor):
        self.largest_bytes = max(self.largest_bytes, tensor.nbytes)
        return tensor


def test_tensors_are_copied_in_small_pieces(tmp_path):
    save_file({"m": torch.randn(3000, 1000), "v": torch.randn(1_000_000)}, tmp_path / "model.safetensors")
    source = Watched(opened(tmp_path))
    (tmp_path / "out").mkdir()
    writer = ModelWriter(tmp_path / "out", ModelLayout.of(source, source.shards), source)
    for key in source.specs:
        writer.copy(key)
    writer.finish()
    assert 2**19 < source.largest_bytes <= 2**20
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_tensors_are_copied_from_several_threads(tmp_path):
    bert().save_pretrained(tmp_path / "base", max_shard_size="5KB")
    source = opened(tmp_path / "base")
    (tmp_path / "out").mkdir()
    writer = ModelWriter(tmp_path / "out", ModelLayout.of(source, source.shards), source)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(writer.copy, source.specs))
    writer.finish()
    base, out = contents(tmp_path / "base"), contents(tmp_path / "out")
    assert all(out[name] == base[name] for name in base if name.endswith(".safetensors"))


def copy_all(writer, keys):
    return {key: writer.copy(key) for key in keys}


def test_a_pickled_writer_goes_on_with_the_same_files_in_another_process(tmp_path):
    bert().save_pretrained(tmp_path / "base", max_shard_size="5KB")
    source = opened(tmp_path / "base")
    (tmp_path / "out").mkdir()
    writer = ModelWriter(tmp_path / "out", ModelLayout.of(source, source.shards), source)
    keys = list(source.specs)
    digests = copy_all(writer, keys[::2])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        others = keys[1::2]
        digests |= dict(zip(others, pool.map(ModelWriter.copy, repeat(writer), others), strict=True))
    assert digests == {key: writer.digest(key) for key in keys}
    writer.finish()
    assert_same_tensors(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "base"))


def test_an_unfinished_model_is_gone_on_with(tmp_path):
    bert().save_pretrained(tmp_path / "base", max_shard_size="5KB")
    source = opened(tmp_path / "base")
    layout = ModelLayout.of(source, source.shards)
    (tmp_path / "out").mkdir()
    keys = list(source.specs)
    first = ModelWriter(tmp_path / "out", layout, source)
    digests = copy_all(first, keys[::2])
    first.abandon()
    second = ModelWriter(tmp_path / "out", layout, source, resumes=True)
    assert all(second.digest(key) == digest for key, digest in digests.items())
    copy_all(second, keys[1::2])
    second.finish()
    base, out = contents(tmp_path / "base"), contents(tmp_path / "out")
    assert all(out[name] == base[name] for name in base if name.endswith(".safetensors"))


def test_files_that_were_not_made_whole_are_made_anew(tmp_path):
    source = in_memory({"a": torch.ones(9), "b": torch.ones(9), "c": torch.ones(9)})
    layout = ModelLayout.of(source, {}, shard_bytes=36)
    first = ModelWriter(tmp_path, layout, source)
    digests = copy_all(first, "abc")
    first.abandon()
    one, two, _ = (tmp_path / name for name in layout.files)
    os.truncate(one, 10)
    two.unlink()
    second = ModelWriter(tmp_path, layout, source, resumes=True)
    assert [second.digest(key) == digests[key] for key in "abc"] == [False, False, True]
    assert copy_all(second, "ab") == {key: digests[key] for key in "ab"}
    second.finish()
    assert_same_tensors(tensors_in(tmp_path), {key: torch.ones(9) for key in "abc"})


def test_a_writer_without_resumption_replaces_what_is_there(tmp_path):
    source = in_memory({"a": torch.ones(9)})
    layout = ModelLayout.of(source, {})
    copy_all(ModelWriter(tmp_path, layout, source), "a")
    writer = ModelWriter(tmp_path, layout, source)
    writer.finish()
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [0] * 9


def failing(code, after=0):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    original = os.posix_fallocate
    return fail


def test_a_disk_too_small_for_all_files_is_known_before_any_work(tmp_path, monkeypatch):
    source = in_memory({"a": torch.ones(9), "b": torch.ones(9)})
    layout = ModelLayout.of(source, {}, shard_bytes=36)
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC, after=1))
    with pytest.raises(DiskError, match=rf"the disk is full: {layout.total_bytes:,} bytes are needed") as caught:
        ModelWriter(tmp_path, layout, source)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_unfinished_files_stay_when_the_rest_finds_no_room(tmp_path, monkeypatch):
    source = in_memory({"a": torch.ones(9), "b": torch.ones(9)})
    layout = ModelLayout.of(source, {}, shard_bytes=36)
    ModelWriter(tmp_path, layout, source).abandon()
    one, two = (tmp_path / name for name in layout.files)
    two.unlink()
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(DiskError, match="the disk is full"):
        ModelWriter(tmp_path, layout, source, resumes=True)
    assert list(tmp_path.iterdir()) == [one]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_while_a_tensor_is_copied_is_a_disk_error(tmp_path, monkeypatch, code):
    source = in_memory({"a": torch.ones(9)})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}), source)
    monkeypatch.setattr(os, "pwrite", failing(code))
    for write in (lambda: writer.copy("a"), lambda: writer.write_rows("a", 0, torch.ones(1, 9))):
        with pytest.raises(DiskError) as caught:
            write()
        assert caught.value.__cause__.errno == code
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_disk_that_is_full_when_companions_are_copied_is_a_disk_error(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text('{"dtype": "float32"}')
    (tmp_path / "out").mkdir()
    source = in_memory({})
    writer = ModelWriter(tmp_path / "out", ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    monkeypatch.setattr("shutil.copyfile", failing(errno.ENOSPC))
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: failing(errno.ENOSPC)())
    with pytest.raises(DiskError, match=rf"{name}: the disk is full: 2\d bytes are needed"):
        writer.finish({name: tmp_path / name})


def test_a_base_that_disappears_is_a_checkpoint_error(tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "model.safetensors")
    source = opened(tmp_path)
    layout = ModelLayout.of(source, source.shards)
    (tmp_path / "out").mkdir()
    writer = ModelWriter(tmp_path / "out", layout, source)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor 'a'"):
        writer.copy("a")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        ModelLayout.of(source, source.shards)


@pytest.mark.parametrize("value", [1e5, -1e300, 65505.0])
def test_a_value_that_the_new_type_cannot_hold_is_an_error(tmp_path, value):
    source = in_memory({"a": torch.tensor([1.0, value, math.inf], dtype=torch.float64)})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    with pytest.raises(OutputError, match="tensor 'a': its values exceed the range of float16; set out_dtype"):
        writer.copy("a")


def test_what_was_not_finite_may_stay_so(tmp_path):
    values = torch.tensor([-math.inf, math.nan, 1.0])
    source = in_memory({"a": values})
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}, out_dtype=torch.float16), source)
    writer.copy("a")
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"].nan_to_num(7), values.half().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_widened_and_narrowed_with_care(tmp_path, dtype):
    values = torch.tensor([[0.5, -448.0], [2.0**-9, 0.0]]).to(dtype)
    source = in_memory({"a": values})
    widened = ModelWriter(tmp_path, ModelLayout.of(source, {}, out_dtype=torch.bfloat16), source)
    widened.copy("a")
    widened.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], values.bfloat16())
    writer = ModelWriter(tmp_path, ModelLayout.of(source, {}), source)
    assert torch.equal(writer.stored("a", values.float()).float(), values.float())
    with pytest.raises(OutputError, match="tensor 'a': its values exceed the range of float8"):
        writer.stored("a", torch.tensor([[1e6, 0.0]]))


def test_a_layout_is_small_enough_to_send_to_every_worker(tmp_path):
    source = in_memory({f"model.layers.{number}.weight": torch.ones(1) for number in range(1000)})
    layout = ModelLayout.of(source, {})
    layout.spec("model.layers.0.weight")
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout
    assert len(pickle.dumps(layout)) < 500_000
