from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import ModelDirectory, ModuleHeader

from .builders import config, state_dict, weights, write_adapter, write_model

Q = "model.layers.0.attn.q_proj"
ones = torch.ones


def error_of(work, *arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        work(*arguments)
    return str(caught.value)


def model_of(path, tensors, **settings) -> ModelDirectory:
    return ModelDirectory(write_model(path, tensors, settings))


def write_shards(path, tensors, suffix="safetensors"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    names = {key: f"{stem}-{number % 2 + 1:05}-of-00002.{suffix}" for number, key in enumerate(tensors)}
    for name in sorted(set(names.values())):
        save({key: tensors[key] for key, own in names.items() if own == name}, path / name)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def test_every_parameter_is_a_module(tmp_path):
    model = model_of(tmp_path, weights(dtype=torch.bfloat16), model_type="llama")
    assert model.config == {"model_type": "llama"}
    assert model.fan_in_fan_out is False
    assert {name: (h.d_out, h.d_in, h.kind) for name, h in model.modules.items()} == {
        "lm_head": (7, 4, "matrix"),
        "model.embed_tokens": (7, 4, "embedding"),
        Q: (6, 4, "matrix"),
        f"{Q}.bias": (1, 6, "vector"),
        "model.layers.0.conv.weight": (3, 4, "vector"),
        "model.norm.weight": (1, 4, "vector"),
    }
    assert list(model.modules) == [model.module_of(key) for key in model.source.specs]
    assert model.modules[Q] == ModuleHeader(
        name=Q, d_out=6, d_in=4, rank=4, scaling=1.0, dtype=torch.bfloat16, stored_bytes=48, is_dense=True
    )
    assert (model.key_of(Q), model.key_of(f"{Q}.bias")) == (f"{Q}.weight", f"{Q}.bias")
    assert model.matrix_shape(f"{Q}.weight") == (6, 4)


def test_parameters_are_read_in_rows_as_matrices(tmp_path):
    tensors = weights()
    model = model_of(tmp_path, tensors)
    assert torch.equal(model.read_rows(f"{Q}.weight", slice(2, 5)), tensors[f"{Q}.weight"][2:5])
    assert torch.equal(model.read_rows(f"{Q}.bias", slice(0, 1)), tensors[f"{Q}.bias"][None])
    assert torch.equal(
        model.read_rows("model.layers.0.conv.weight", slice(1, 3)),
        tensors["model.layers.0.conv.weight"][1:].flatten(1),
    )


def test_a_number_is_a_matrix_of_one_entry(tmp_path):
    model = model_of(tmp_path, {"logit_scale": torch.tensor(2.5)})
    assert (model.modules["logit_scale"].d_out, model.modules["logit_scale"].d_in) == (1, 1)
    assert model.read_rows("logit_scale", slice(0, 1)).tolist() == [[2.5]]


def test_integers_masks_and_buffers_are_no_parameters(tmp_path):
    buffers = {
        "embeddings.position_ids": torch.arange(5),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "layers.0.rotary_emb.inv_freq": torch.ones(3),
        "batch_norm.num_batches_tracked": torch.tensor(3),
        "empty": torch.ones(0, 3),
    }
    model = model_of(tmp_path, {"h.1.attn.bias": torch.ones(4), **buffers})
    assert list(model.modules) == ["h.1.attn.bias"]
    assert set(buffers) < set(model.source.specs)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_listed_in_the_order_of_their_files(tmp_path, suffix):
    tensors = {f"layers.{number}.q.weight": torch.full((2, 3), float(number)) for number in range(4)}
    model = ModelDirectory(write_shards(tmp_path, tensors, suffix))
    assert {file.name.partition("-")[2]: keys for file, keys in model.shards.items()} == {
        f"00001-of-00002.{suffix}": ("layers.0.q.weight", "layers.2.q.weight"),
        f"00002-of-00002.{suffix}": ("layers.1.q.weight", "layers.3.q.weight"),
    }
    assert model.files == (tmp_path / "config.json", *model.source.files)
    assert model.read_rows("layers.3.q.weight", slice(1, 2)).tolist() == [[3.0, 3.0, 3.0]]


def test_one_file_is_one_shard(tmp_path):
    model = model_of(tmp_path, {"b": ones(1), "a": ones(2)})
    assert model.shards == {tmp_path / "model.safetensors": tuple(model.source.specs)}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_pickled_directory_reads_the_same(tmp_path, suffix):
    model = ModelDirectory(write_shards(tmp_path, weights(), suffix))
    again = pickle.loads(pickle.dumps(model))
    assert len(pickle.dumps(model)) < 20_000
    assert (again.modules, again.shards, again.tied) == (model.modules, model.shards, model.tied)
    assert torch.equal(again.source.read(f"{Q}.weight"), weights()[f"{Q}.weight"])


def test_companions_are_what_the_model_needs_and_no_weights(tmp_path):
    write_model(tmp_path, weights())
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_own.py"]
    kept += ["preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.json"]
    left = ["README.md", "adapter_config.json", "manifest.json", "model.onnx", "optimizer.pt", "training_args.bin"]
    for name in kept + left:
        (tmp_path / name).touch()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").touch()
    (tmp_path / "tokenizer_old").mkdir()
    companions = [str(path.relative_to(tmp_path)) for path in ModelDirectory(tmp_path).companions]
    assert companions == sorted([*kept, "config.json", "additional_chat_templates/tools.jinja"])


def test_the_fingerprint_changes_with_any_file(tmp_path):
    write_model(tmp_path, weights())
    (tmp_path / "tokenizer.json").touch()
    first = ModelDirectory(tmp_path).fingerprint
    assert ModelDirectory(tmp_path).fingerprint == first
    (tmp_path / "README.md").touch()
    assert ModelDirectory(tmp_path).fingerprint == first
    os.utime(tmp_path / "tokenizer.json", (0, 0))
    assert ModelDirectory(tmp_path).fingerprint != first


def test_the_fingerprint_changes_with_the_header_alone(tmp_path):
    prints = []
    for name in ("a", "b"):
        write_model(tmp_path, {name: ones(3)})
        for file in tmp_path.iterdir():
            os.utime(file, (0, 0))
        prints.append(ModelDirectory(tmp_path).fingerprint)
    assert prints[0] != prints[1]


def test_a_file_that_is_gone_has_no_fingerprint(tmp_path):
    model = model_of(tmp_path, weights())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base model '.*': cannot be read: .*model\.safetensors"):
        _ = model.fingerprint


class TestNames:
    """Modules as inputs call them, and the base's tensors."""

    @pytest.mark.parametrize(
        ("stored", "wanted"),
        [
            (["layers.0.q", "layers.1.q"], ["layers.1.q"]),
            (["model.layers.0.q", "model.layers.1.q"], ["layers.0.q", "layers.1.q"]),
            (["layers.0.q", "layers.1.q"], ["base.model.layers.0.q", "base.model.layers.1.q"]),
            (["h.0.q", "score"], ["transformer.h.0.q", "score"]),
        ],
    )
    def test_one_prefix_may_be_lacking_or_too_much(self, tmp_path, stored, wanted):
        model = model_of(tmp_path, {f"{name}.weight": ones(2, 2) for name in stored})
        keys = model.keys_for(wanted)
        assert list(keys) == wanted
        assert all(key in model.source.specs and key.endswith(f"{name[-3:]}.weight") for name, key in keys.items())

    def test_other_parameters_go_by_their_whole_names(self, tmp_path):
        model = model_of(tmp_path, weights())
        assert model.keys_for([f"layers.0.attn.{name}" for name in ("q_proj", "q_proj.bias")]) == {
            "layers.0.attn.q_proj": f"{Q}.weight",
            "layers.0.attn.q_proj.bias": f"{Q}.bias",
        }

    def test_two_prefixes_are_refused(self, tmp_path):
        model = model_of(tmp_path, {"a.q.weight": ones(2, 2), "b.v.weight": ones(2, 2)})
        assert error_of(model.keys_for, ["q", "v"]).startswith(
            f"base model '{tmp_path}': modules that it lacks: 'q', 'v'. "
        )

    def test_a_prefix_that_is_not_the_only_one_is_not_guessed(self, tmp_path):
        model = model_of(tmp_path, {"encoder.q.weight": ones(2, 2), "decoder.q.weight": ones(2, 2)})
        assert "modules that it lacks: 'q'." in error_of(model.keys_for, ["q"])

    def test_a_prefix_that_makes_two_modules_one_is_refused(self, tmp_path):
        model = model_of(tmp_path, {"q.weight": ones(2, 2)})
        assert "modules that it lacks: 'model.q'." in error_of(model.keys_for, ["q", "model.q"])

    def test_the_nearest_name_is_said(self, tmp_path):
        model = model_of(tmp_path, {"layers.0.q_proj.weight": ones(2, 2), "layers.0.v_proj.weight": ones(2, 2)})
        assert error_of(model.keys_for, ["layers.0.q_porj", "layers.0.v_proj"]) == (
            f"base model '{tmp_path}': modules that it lacks: 'layers.0.q_porj'. The nearest to 'layers.0.q_porj' is "
            "'layers.0.q_proj'. Give the base that the inputs were tuned from; only one prefix of all names may differ."
        )

    def test_buffers_cannot_be_changed(self, tmp_path):
        model = model_of(tmp_path, {"rotary_emb.inv_freq": ones(2), "q.weight": ones(2, 2)})
        assert "modules that it lacks: 'rotary_emb.inv_freq'" in error_of(model.keys_for, ["rotary_emb.inv_freq"])


class TestTies:
    """Tensors that are one parameter."""

    def test_copies_of_one_parameter_are_known_by_their_values(self, tmp_path):
        tensors = {**weights(), "model.wpe.weight": weights()["model.embed_tokens.weight"]}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        model = model_of(tmp_path, tensors)
        assert model.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
        assert model.partners("model.embed_tokens.weight") == ("lm_head.weight",)
        assert model.partners("lm_head.weight") == ("model.embed_tokens.weight",)
        assert model.partners("model.wpe.weight") == ()

    def test_other_values_are_another_parameter(self, tmp_path):
        model = model_of(tmp_path, weights())
        assert model.tied == ()
        assert model.keys_for(["lm_head"]) == {"lm_head": "lm_head.weight"}

    @pytest.mark.parametrize(
        "settings", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}]
    )
    def test_a_configuration_can_untie_equal_values(self, tmp_path, settings):
        tensors = {"embed_tokens.weight": ones(7, 4), "lm_head.weight": ones(7, 4)}
        model = model_of(tmp_path, tensors, **settings)
        assert model.tied == ()
        assert model.keys_for(["lm_head"]) == {"lm_head": "lm_head.weight"}

    def test_encoder_and_decoder_share_even_when_the_output_does_not(self, tmp_path):
        names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        model = model_of(tmp_path, {f"{name}.weight": ones(7, 4) for name in names}, tie_word_embeddings=False)
        assert model.tied == (("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),)

    def test_values_that_are_not_numbers_compare_by_their_bytes(self, tmp_path):
        nan = torch.full((7, 4), float("nan")).to(torch.float8_e4m3fn)
        model = model_of(tmp_path, {"embed_tokens.weight": nan, "lm_head.weight": nan})
        assert model.tied == (("embed_tokens.weight", "lm_head.weight"),)

    @pytest.mark.parametrize("stored", [["wte"], ["wte", "lm_head"]])
    def test_an_update_of_a_tied_output_is_refused(self, tmp_path, stored):
        model = model_of(tmp_path, {f"{name}.weight": ones(7, 4) for name in [*stored, "h.0.q"]})
        assert error_of(model.keys_for, ["transformer.h.0.q", "lm_head"]) == (
            f"base model '{tmp_path}': an output layer that is tied to the embedding, which would change with it: "
            "'lm_head'. Leave it out of the adapter, or untie the base: save it with tie_word_embeddings=False."
        )

    def test_an_output_that_is_lacking_and_not_tied_is_a_missing_module(self, tmp_path):
        model = model_of(tmp_path, {"wte.weight": ones(7, 4)}, tie_word_embeddings=False)
        assert "modules that it lacks: 'lm_head'" in error_of(model.keys_for, ["lm_head"])


class TestTransposed:
    """Layers that store (in, out)."""

    def test_only_their_headers_are_turned(self, tmp_path):
        tensors = {f"h.0.{name}": ones(4, 12) for name in ("attn.c_attn.weight", "other.weight", "c_fc.special")}
        model = model_of(tmp_path, {**tensors, "h.0.attn.c_attn.bias": ones(12)}, model_type="gpt2")
        assert model.fan_in_fan_out
        assert {name: (h.d_out, h.d_in) for name, h in model.modules.items()} == {
            "h.0.attn.c_attn": (12, 4),
            "h.0.other": (4, 12),
            "h.0.c_fc.special": (4, 12),
            "h.0.attn.c_attn.bias": (1, 12),
        }
        assert model.matrix_shape("h.0.attn.c_attn.weight") == (12, 4)
        assert [name for name in model.modules if model.is_transposed(name)] == ["h.0.attn.c_attn"]

    def test_a_part_of_a_larger_model_may_be_one_of_them(self, tmp_path):
        tensors = {"decoder.h.0.attn.c_proj.weight": ones(4, 4)}
        decoder = {"model_type": "gpt2"}
        model = model_of(tmp_path, tensors, model_type="vision-encoder-decoder", decoder=decoder)
        assert model.is_transposed("decoder.h.0.attn.c_proj")

    def test_other_models_may_use_the_names(self, tmp_path):
        model = model_of(tmp_path, {"h.0.attn.c_attn.weight": ones(12, 4)}, model_type="gpt_bigcode")
        assert not model.fan_in_fan_out
        assert model.modules["h.0.attn.c_attn"].d_out == 12


ORIGINAL = "Give the model that it was quantised from, in float32, bfloat16 or float16, and quantise the result again."
SCALED = (
    "Its weights mean nothing without their scales: give the bfloat16 model that it was made from, or load it "
    "dequantised, remove 'quantization_config' from its config.json, and save it."
)


class TestQuantised:
    """Bases that hold no weights to add to."""

    @pytest.mark.parametrize(
        ("settings", "method", "advice"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", ORIGINAL),
            ({"load_in_8bit": True}, "bitsandbytes", ORIGINAL),
            ({"quant_method": "gptq"}, "GPTQ", ORIGINAL),
            ({"quant_method": "awq"}, "AWQ", ORIGINAL),
            ({"quant_method": "compressed-tensors"}, "compressed-tensors", ORIGINAL),
            ({"quant_method": "hqq"}, "hqq", ORIGINAL),
            ({"bits": 4}, "a method that it does not name", ORIGINAL),
            ({"quant_method": "fp8"}, "fp8 with scale tensors", SCALED),
            ({"quant_method": "fbgemm_fp8"}, "fp8 with scale tensors", SCALED),
            ({"quant_method": "mxfp4"}, "MXFP4", SCALED),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_its_configuration_says_so(self, tmp_path, settings, method, advice, nested):
        config = {"quantization_config": settings}
        path = write_model(tmp_path, weights(), {"text_config": config} if nested else config)
        assert error_of(ModelDirectory, path) == (
            f"base model '{path}': the weights are quantised by {method} (its config.json says so in "
            f"'quantization_config'), which is not handled. {advice}"
        )

    @pytest.mark.parametrize(
        ("name", "method", "advice"),
        [
            ("layers.0.q.weight.absmax", "bitsandbytes", ORIGINAL),
            ("layers.0.q.weight.quant_state.bitsandbytes__nf4", "bitsandbytes", ORIGINAL),
            ("layers.0.q.SCB", "bitsandbytes", ORIGINAL),
            ("layers.0.q.qweight", "GPTQ or AWQ", ORIGINAL),
            ("layers.0.q.weight_packed", "compressed-tensors", ORIGINAL),
            ("layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4", SCALED),
            ("layers.0.q.weight_scale_inv", "fp8 with scale tensors", SCALED),
            ("layers.0.q.weight_scale", "fp8 with scale tensors", SCALED),
            ("layers.0.q.input_scale", "fp8 with scale tensors", SCALED),
        ],
    )
    def test_its_tensors_say_so(self, tmp_path, name, method, advice):
        path = write_model(tmp_path, {**weights(), name: ones(3)})
        assert error_of(ModelDirectory, path) == (
            f"base model '{path}': the weights are quantised by {method} (it holds '{name}'), which is not handled. "
            f"{advice}"
        )

    def test_weights_packed_into_integers_are_refused(self, tmp_path):
        path = write_model(tmp_path, {**weights(), "q.weight": ones(2, 3, dtype=torch.uint8)})
        assert error_of(ModelDirectory, path) == (
            f"base model '{path}': weights that are not floating-point numbers: 'q.weight' (uint8). Give the model in "
            "float32, bfloat16 or float16."
        )

    def test_fp8_that_was_only_cast_is_accepted(self, tmp_path):
        model = model_of(tmp_path, {"q.weight": ones(2, 2).to(torch.float8_e4m3fn), "logit_scale": ones(())})
        assert model.modules["q"].dtype == torch.float8_e4m3fn

    @pytest.mark.parametrize("empty", [None, {}])
    def test_an_empty_setting_is_none(self, tmp_path, empty):
        assert model_of(tmp_path, weights(), quantization_config=empty).modules


class TestNoModel:
    """Directories that hold no model."""

    def test_a_missing_directory(self, tmp_path):
        assert error_of(ModelDirectory, tmp_path / "no") == (
            f"base model '{tmp_path / 'no'}': there is no such directory. Expected a Hugging Face model: a directory "
            "with config.json and model.safetensors, pytorch_model.bin, or the index of their shards."
        )

    def test_no_configuration(self, tmp_path):
        assert error_of(ModelDirectory, tmp_path) == (
            f"base model '{tmp_path}': {tmp_path} has no config.json. Expected a Hugging Face model directory: "
            "download it again."
        )

    def test_an_adapter(self, tmp_path):
        write_adapter(tmp_path, state_dict(), config())
        assert error_of(ModelDirectory, tmp_path).endswith(
            "has no config.json. It is an adapter (adapter_config.json): give the model that it was tuned from."
        )

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{", "is not readable as JSON: "),
            ("[" * 100_000, "is not readable as JSON: "),
            ("[]", "holds a list; expected"),
        ],
    )
    def test_a_configuration_that_is_none(self, tmp_path, content, expected):
        write_model(tmp_path, weights())
        (tmp_path / "config.json").write_text(content)
        assert f"base model '{tmp_path}': {tmp_path / 'config.json'} {expected}" in error_of(ModelDirectory, tmp_path)

    def test_no_weights(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert error_of(ModelDirectory, tmp_path) == (
            f"base model '{tmp_path}': {tmp_path} has none of model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin, pytorch_model.bin.index.json. Download all of it."
        )

    def test_shards_without_their_index(self, tmp_path):
        path = write_shards(tmp_path, weights())
        (path / "model.safetensors.index.json").unlink()
        assert error_of(ModelDirectory, path).endswith(
            "pytorch_model.bin.index.json; it holds 'model-00001-of-00002.safetensors', a shard, but no index. "
            "Download all of it."
        )

    def test_no_parameters(self, tmp_path):
        write_model(tmp_path, {"steps": torch.tensor(3)})
        assert error_of(ModelDirectory, tmp_path) == (
            f"base model '{tmp_path}': {tmp_path / 'model.safetensors'} holds no parameters. Download it again."
        )
