from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import FineTune, ModelDirectory, PeftFormat, WholeModel, WholeModelFormat
from mergekit_lowrank.testing.memory import held

from .builders import config, state_dict, weights, write_adapter, write_model

Q = "model.layers.0.attn.q_proj"
ones = torch.ones
everything = slice(None)


def opened(path) -> WholeModel:
    return WholeModelFormat().open(path, label="math")


def fine_tune_of(path, tensors, base, *, dtype=torch.float32, settings=None, base_settings=None) -> FineTune:
    whole = opened(write_model(path / "math", tensors, settings))
    return whole.against(ModelDirectory(write_model(path / "base", base, base_settings)), dtype)


def error_of(work, *arguments, **settings) -> str:
    with pytest.raises(CheckpointError) as caught:
        work(*arguments, **settings)
    return str(caught.value)


def delta_of(fine_tune, module):
    update = fine_tune.read(module)
    return update.rows(slice(0, update.shape[0]))


class TestFormat:
    """What is recognised, and what is known without a base."""

    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
            "model-00001-of-00002.safetensors",
        ],
    )
    def test_a_configuration_with_weights_is_recognised(self, tmp_path, name):
        (tmp_path / "config.json").touch()
        assert not WholeModelFormat().recognises(tmp_path)
        (tmp_path / name).touch()
        assert WholeModelFormat().recognises(tmp_path)
        (tmp_path / "config.json").unlink()
        assert not WholeModelFormat().recognises(tmp_path)

    def test_an_adapter_is_left_to_its_format(self, tmp_path):
        write_adapter(write_model(tmp_path, weights()), state_dict(), config())
        assert PeftFormat().recognises(tmp_path)
        assert not WholeModelFormat().recognises(tmp_path)

    def test_files_and_missing_paths_are_not_recognised(self, tmp_path):
        write_model(tmp_path, weights())
        assert not WholeModelFormat().recognises(tmp_path / "model.safetensors")
        assert not WholeModelFormat().recognises(tmp_path / "missing")

    def test_a_model_is_described_without_its_base(self, tmp_path):
        whole = opened(write_model(tmp_path, weights()))
        assert (whole.label, whole.location, whole.base_model) == ("math", str(tmp_path), None)
        assert whole.files == (tmp_path / "config.json", tmp_path / "model.safetensors")
        assert whole.modules[Q].is_dense
        assert whole.config == {"model_type": "llama"}

    def test_without_a_base_there_is_no_update(self, tmp_path):
        whole = opened(write_model(tmp_path, weights()))
        expected = (
            "model 'math': it is a whole model, of which the difference to its base is merged, and no base is given. "
            "Add 'base_model', the path of the model that it was tuned from, to the recipe."
        )
        assert error_of(whole.read, Q) == expected
        assert whole.needs_base == "it is a whole model, of which the difference to its base is merged"

    def test_problems_of_the_directory_name_the_input(self, tmp_path):
        write_model(tmp_path, weights(), {"quantization_config": {"quant_method": "gptq"}})
        assert error_of(opened, tmp_path).startswith("model 'math': the weights are quantised by GPTQ")

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"\x00\xff" * 40, None], ids=["emptied", "overwritten", "cut in half"])
    def test_a_damaged_file_is_named(self, tmp_path, file, content):
        damaged = write_model(tmp_path, weights()) / file
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: len(whole) // 2] if content is None else content)
        assert str(damaged) in error_of(opened, tmp_path)


class TestDifference:
    """W − W0, as it is stored and as it is read."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_parameter_is_subtracted(self, tmp_path, dtype):
        own, base = weights(1), weights(2)
        fine_tune = fine_tune_of(tmp_path, own, base, dtype=dtype)
        assert list(fine_tune.modules) == list(ModelDirectory(tmp_path / "math").modules)
        for name, header in fine_tune.modules.items():
            update = fine_tune.read(name)
            key = f"{name}.weight" if f"{name}.weight" in own else name
            expected = (own[key].to(dtype) - base[key].to(dtype)).reshape(header.d_out, header.d_in)
            assert update.shape == (header.d_out, header.d_in)
            assert (update.dtype, update.device) == (dtype, torch.device("cpu"))
            assert torch.equal(update.rows(slice(0, header.d_out)), expected)
            assert torch.equal(update.rows(slice(1, 2)), expected[1:2])

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_narrow_types_are_widened_before(self, tmp_path, stored):
        own, base = weights(1, dtype=stored), weights(2)
        fine_tune = fine_tune_of(tmp_path, own, base)
        assert fine_tune.modules[Q].dtype == stored
        key = f"{Q}.weight"
        assert torch.equal(delta_of(fine_tune, Q), own[key].float() - base[key])

    @pytest.mark.parametrize("wide", ["own", "base"])
    def test_doubles_are_subtracted_as_doubles(self, tmp_path, wide):
        near = {"q.weight": torch.full((1, 1), 1.0 + 2**-30, dtype=torch.float64)}
        one = {"q.weight": ones(1, 1)}
        own, base = (near, one) if wide == "own" else (one, near)
        assert delta_of(fine_tune_of(tmp_path, own, base), "q").abs().item() == 2**-30

    def test_rows_are_new_each_time(self, tmp_path):
        for name, tensors in (("math", weights(1)), ("base", weights(2))):
            write_model(tmp_path / name, tensors)
            torch.save(tensors, tmp_path / name / "pytorch_model.bin")
            (tmp_path / name / "model.safetensors").unlink()
        update = opened(tmp_path / "math").against(ModelDirectory(tmp_path / "base"), torch.float32).read(Q)
        first = update.rows(slice(0, 6)).clone()
        update.rows(slice(0, 6)).zero_()
        assert torch.equal(update.rows(slice(0, 6)), first)

    def test_several_threads_read_one_fine_tune(self, tmp_path):
        fine_tune = fine_tune_of(tmp_path, weights(1), weights(2))
        names = list(fine_tune.modules) * 8
        with ThreadPoolExecutor(8) as pool:
            for name, rows in zip(names, pool.map(lambda name: delta_of(fine_tune, name), names), strict=True):
                assert torch.equal(rows, delta_of(fine_tune, name))

    def test_only_the_rows_asked_for_are_held(self, tmp_path):
        tensors = {"q.weight": ones(2048, 256)}
        update = fine_tune_of(tmp_path, tensors, tensors).read("q")
        update.rows(slice(0, 1))
        assert held(lambda: update.rows(slice(64, 128))).peak_bytes < 2048 * 256 * 4 / 4

    def test_a_pickled_fine_tune_reads_the_same(self, tmp_path):
        fine_tune = fine_tune_of(tmp_path, weights(1), weights(2))
        again = pickle.loads(pickle.dumps(fine_tune))
        assert torch.equal(delta_of(again, Q), delta_of(fine_tune, Q))

    def test_shards_need_not_be_those_of_the_base(self, tmp_path):
        tensors, base = weights(1), write_model(tmp_path / "base", weights(2))
        whole = write_model(tmp_path / "math", tensors)
        (whole / "model.safetensors").unlink()
        files = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(tensors)}
        for file in set(files.values()):
            save_file({key: tensors[key] for key, own in files.items() if own == file}, whole / file)
        (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        fine_tune = opened(whole).against(ModelDirectory(base), torch.float32)
        assert torch.equal(delta_of(fine_tune, "lm_head"), tensors["lm_head.weight"] - weights(2)["lm_head.weight"])

    def test_layers_stored_in_out_are_turned(self, tmp_path):
        own, base = (
            {
                "h.0.c_attn.weight": torch.randn(4, 12),
                "h.0.c_attn.bias": torch.randn(12),
                "lm_head.weight": torch.randn(5, 4),
            }
            for _ in range(2)
        )
        fine_tune = fine_tune_of(
            tmp_path, own, base, settings={"model_type": "gpt2"}, base_settings={"model_type": "gpt2"}
        )
        assert fine_tune.fan_in_fan_out
        update = fine_tune.read("h.0.c_attn")
        expected = (own["h.0.c_attn.weight"] - base["h.0.c_attn.weight"]).T
        assert update.shape == (12, 4)
        assert torch.equal(update.rows(slice(3, 7)), expected[3:7])
        assert update.rows(slice(3, 7)).is_contiguous()
        assert torch.equal(delta_of(fine_tune, "lm_head"), own["lm_head.weight"] - base["lm_head.weight"])
        assert fine_tune.read("h.0.c_attn.bias").shape == (1, 12)


class TestValues:
    """Weights that cannot be merged."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("spoilt", ["math", "base"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_not_finite_is_named_when_read(self, tmp_path, value, spoilt, dtype):
        tensors = {"math": weights(1, dtype=dtype), "base": weights(2, dtype=dtype)}
        tensors[spoilt][f"{Q}.weight"][3, 1] = value
        update = fine_tune_of(tmp_path, tensors["math"], tensors["base"]).read(Q)
        update.rows(slice(0, 3))
        where = "model 'math'" if spoilt == "math" else f"base model '{tmp_path / 'base'}'"
        assert error_of(update.rows, slice(2, 5)) == (
            f"{where}: tensor '{Q}.weight' holds 1 NaN or infinite values in rows 2 to 4. A merge would spread them: "
            "train or save the model again."
        )

    def test_equal_infinities_are_not_a_difference_of_zero(self, tmp_path):
        tensors = {"q.weight": torch.full((2, 2), float("inf"))}
        assert "model 'math': tensor 'q.weight' holds 4 NaN or inf" in error_of(
            fine_tune_of(tmp_path, tensors, tensors).read("q").rows, slice(0, 2)
        )

    def test_a_difference_that_overflows_is_named(self, tmp_path):
        largest = torch.full((1, 1), torch.finfo(torch.float32).max)
        fine_tune = fine_tune_of(tmp_path, {"q.weight": largest}, {"q.weight": -largest})
        assert error_of(fine_tune.read("q").rows, slice(0, 1)) == (
            "model 'math': tensor 'q.weight' differs from the base by more than float32 can hold: merge with "
            "'dtype: float64'."
        )

    def test_large_finite_values_are_accepted(self, tmp_path):
        large = {"q.weight": torch.full((3, 3), torch.finfo(torch.float32).max)}
        fine_tune = fine_tune_of(tmp_path, large, {"q.weight": torch.zeros(3, 3)})
        assert torch.equal(delta_of(fine_tune, "q"), large["q.weight"])

    def test_a_file_that_disappears_is_named_when_read(self, tmp_path):
        update = fine_tune_of(tmp_path, weights(1), weights(2)).read(Q)
        (tmp_path / "base" / "model.safetensors").unlink()
        assert error_of(update.rows, slice(0, 1)).startswith(f"{tmp_path / 'base' / 'model.safetensors'}: cannot read")


class TestParameters:
    """Models that do not have the parameters of their base."""

    def test_what_one_of_the_two_lacks_is_named(self, tmp_path):
        own, base = weights(1), weights(2)
        own["score.weight"], base["model.norm.bias"] = ones(2, 4), ones(4)
        assert error_of(fine_tune_of, tmp_path, own, base) == (
            "2 problems:\n"
            "1. model 'math': parameters that the base lacks: 'score.weight'. Give the base that it was tuned from, or "
            "remove what was added, such as a new head.\n"
            "2. model 'math': parameters of the base that it lacks: 'model.norm.bias'. Give the base that it was tuned "
            "from, or save the whole model again."
        )

    def test_another_shape_is_named(self, tmp_path):
        own, base = weights(1), weights(2)
        own["model.embed_tokens.weight"] = ones(8, 4)
        assert error_of(fine_tune_of, tmp_path, own, base) == (
            "model 'math': parameters of another shape than in the base: 'model.embed_tokens.weight' ([8, 4], base "
            "[7, 4]). Give the base that it was tuned from. A vocabulary that was resized cannot be merged: resize it "
            "back."
        )

    def test_another_prefix_is_the_base_s(self, tmp_path):
        own = {f"transformer.{key}": value for key, value in weights(1).items()}
        fine_tune = fine_tune_of(tmp_path, own, weights(2))
        assert list(fine_tune.modules) == list(ModelDirectory(tmp_path / "base").modules)
        assert fine_tune.modules[Q].name == Q
        assert torch.equal(delta_of(fine_tune, Q), weights(1)[f"{Q}.weight"] - weights(2)[f"{Q}.weight"])

    def test_integers_and_buffers_may_differ_or_be_lacking(self, tmp_path):
        own = {**weights(1), "position_ids": torch.arange(3), "steps": torch.tensor(1)}
        base = {**weights(2), "rotary_emb.inv_freq": ones(2), "steps": torch.tensor(2)}
        assert set(fine_tune_of(tmp_path, own, base).modules) == set(opened(tmp_path / "math").modules)


class TestTies:
    """Parameters that one of the two stores more than once."""

    embedding = "model.embed_tokens.weight"

    def tied(self, seed, *names):
        tensors = weights(seed)
        del tensors["lm_head.weight"]
        return tensors | dict.fromkeys(names, tensors[self.embedding])

    @pytest.mark.parametrize("own", [(), ("lm_head.weight",)])
    @pytest.mark.parametrize("base", [(), ("lm_head.weight",)])
    def test_copies_are_one_module(self, tmp_path, own, base):
        fine_tune = fine_tune_of(tmp_path, self.tied(1, *own), self.tied(2, *base))
        assert "lm_head" not in fine_tune.modules
        expected = weights(1)[self.embedding] - weights(2)[self.embedding]
        assert torch.equal(delta_of(fine_tune, "model.embed_tokens"), expected)

    @pytest.mark.parametrize(("own", "base"), [("lm_head", "shared"), ("decoder.embed_tokens", "shared")])
    def test_each_may_store_another_copy(self, tmp_path, own, base):
        fine_tune = fine_tune_of(tmp_path, {f"{own}.weight": 3 * ones(7, 4)}, {f"{base}.weight": ones(7, 4)})
        assert list(fine_tune.modules) == [base]
        assert torch.equal(delta_of(fine_tune, base), 2 * ones(7, 4))

    def test_a_name_that_is_never_tied_is_not_guessed(self, tmp_path):
        message = error_of(fine_tune_of, tmp_path, {"wpe.weight": ones(7, 4)}, {"embed_positions.weight": ones(7, 4)})
        assert "parameters that the base lacks: 'wpe.weight'" in message
        assert "parameters of the base that it lacks: 'embed_positions.weight'" in message

    @pytest.mark.parametrize("untied", ["math", "base"])
    def test_a_tie_on_one_side_only_is_refused(self, tmp_path, untied):
        tensors = {"math": self.tied(1), "base": self.tied(2)}
        tensors[untied] = weights(3)
        assert error_of(fine_tune_of, tmp_path, tensors["math"], tensors["base"]) == (
            "model 'math': output layers that are tied to the embedding in it or in the base, but not in both: "
            "'lm_head.weight'. Save both models with the same 'tie_word_embeddings'."
        )

    def test_untied_outputs_are_modules_of_their_own(self, tmp_path):
        assert "lm_head" in fine_tune_of(tmp_path, weights(1), weights(2)).modules
