"""Adapters of several variants in one merge: what peft loads in the end, and what is refused because it does not."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError, IncompatibleInputsError, OutputError, merge, plan

from .lora_variants import VARIANTS, Variant, llama, loaded, mixtral, summed, tied_llama, trained
from .makers import relative_error

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(autouse=True)
def peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, patterns of parameters, biases: whoever wrote the adapter
        yield


def recipe_of(*paths, **changes):
    models = [{"model": str(path), "parameters": {"weight": 1 / len(paths)}} for path in paths]
    return {"merge_method": "task_arithmetic", "models": models, "output": {"rank": "sum"}, **changes}


def made(tmp_path, name, model=llama, seed=1, **config):
    return trained(Variant(model, config), tmp_path / name, seed)


class TestPatternsOfExperts:
    @pytest.mark.parametrize("pattern", [{"q_proj": 2}, {"mlp.experts": 20}])
    def test_what_peft_does_not_match_is_not_applied(self, tmp_path, pattern) -> None:
        config = {**EXPERTS, "alpha_pattern": pattern}
        path = made(tmp_path, "a", mixtral, **config)
        merge(recipe_of(path), tmp_path / "out")
        variant = Variant(mixtral, config)
        assert relative_error(loaded(variant, tmp_path / "out"), loaded(variant, path)) < 1e-5

    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
    def test_one_parameter_of_two_cannot_be_told(self, tmp_path, field) -> None:
        path = made(tmp_path, "a", mixtral, **EXPERTS, **{field: {"mlp.experts.gate_up_proj": 4}})
        with pytest.raises(CheckpointError, match="fused parameters of one module with ranks or alphas of their own"):
            plan(recipe_of(path))

    def test_one_parameter_alone_has_its_pattern(self, tmp_path) -> None:
        config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        config |= {"rank_pattern": {"mlp.experts.down_proj": 4}, "alpha_pattern": {"mlp.experts.down_proj": 20}}
        path = made(tmp_path, "a", mixtral, **config)
        merge(recipe_of(path, output={"uniform_rank": False}), tmp_path / "out")
        variant = Variant(mixtral, config)
        assert relative_error(loaded(variant, tmp_path / "out"), loaded(variant, path)) < 1e-5

    def test_ranks_of_their_own_are_written_as_peft_matches_them(self, tmp_path) -> None:
        config = {**EXPERTS, "rank_pattern": {"q_proj": 5}}
        path = made(tmp_path, "a", mixtral, **config)
        merge(recipe_of(path, output={"uniform_rank": False}), tmp_path / "out")
        variant = Variant(mixtral, config)
        assert relative_error(loaded(variant, tmp_path / "out"), loaded(variant, path)) < 1e-5


class TestWhatPeftDoesNotLoad:
    @pytest.mark.parametrize(
        ("one", "other", "model", "what"),
        [
            ({"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}, llama, "factors of an embedding"),
            ({"lora_bias": True}, EXPERTS, mixtral, "factors of fused experts"),
            (
                {"trainable_token_indices": [3]},
                {"target_modules": ["q_proj", "embed_tokens"]},
                llama,
                "trained rows and factors of one embedding",
            ),
            (
                {"trainable_token_indices": [3]},
                {"modules_to_save": ["embed_tokens"]},
                llama,
                "trained rows of an embedding and all of it",
            ),
        ],
    )
    def test_it_is_refused_before_it_is_merged(self, tmp_path, one, other, model, what) -> None:
        paths = [
            made(tmp_path, name, model, **{"target_modules": ["q_proj"], **config})
            for name, config in (("a", one), ("b", other))
        ]
        with pytest.raises(IncompatibleInputsError, match=what):
            plan(recipe_of(*paths, extras="average"))

    def test_a_head_saved_by_one_is_left_out_as_the_advice_says(self, tmp_path) -> None:
        saved = made(tmp_path, "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
        factored = made(tmp_path, "b", target_modules=["q_proj", "lm_head"])
        with pytest.raises(IncompatibleInputsError, match=r"Leave one out, such as by extras: \{from: base_model\}"):
            plan(recipe_of(saved, factored, extras="average"))
        assert plan(recipe_of(saved, factored, extras={"from": "base_model"}))


class TestPrefixes:
    def test_a_head_that_both_have_hides_no_difference(self, tmp_path) -> None:
        path = made(tmp_path, "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
        other = shutil.copytree(path, tmp_path / "b")
        tensors = load_file(other / "adapter_model.safetensors")
        from safetensors.torch import save_file

        save_file(
            {key.replace(".model.model.layers", ".model.layers"): tensor for key, tensor in tensors.items()},
            other / "adapter_model.safetensors",
        )
        with pytest.raises(IncompatibleInputsError, match="shares no module"):
            plan(recipe_of(path, other, extras="average"))


class TestTiedBases:
    def test_an_embedding_that_changes_alone_is_a_warning(self, tmp_path) -> None:
        tied_llama().save_pretrained(tmp_path / "base")
        path = made(tmp_path, "a", tied_llama, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        changes = {"base_model": str(tmp_path / "base"), "output": {"kind": "model"}, "extras": "average"}
        assert any("is the output layer of the base too" in own for own in plan(recipe_of(path, **changes)).warnings)

    def test_both_together_are_none(self, tmp_path) -> None:
        variant = VARIANTS["tied_modules_to_save"]
        variant.model().save_pretrained(tmp_path / "base")
        path = trained(variant, tmp_path / "a", 1)
        changes = {"base_model": str(tmp_path / "base"), "output": {"kind": "model"}, "extras": "average"}
        assert not any("output layer" in own for own in plan(recipe_of(path, **changes)).warnings)

    def test_differences_of_a_tied_output_are_to_the_embedding(self, tmp_path) -> None:
        variant = VARIANTS["tied_modules_to_save"]
        variant.model().save_pretrained(tmp_path / "base")
        path = trained(variant, tmp_path / "a", 1)
        merge(recipe_of(path, base_model=str(tmp_path / "base"), extras="delta"), tmp_path / "out")
        assert relative_error(loaded(variant, tmp_path / "out"), summed(variant, [path], [1.0])) < 1e-5


class TestBaseOfAnAdapter:
    @pytest.fixture
    def dora(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        path = made(tmp_path, "a", target_modules=["q_proj"], use_dora=True)
        return recipe_of(path, base_model=str(tmp_path / "base"), output={"rank": 4})

    def test_it_is_never_overwritten(self, dora, tmp_path) -> None:
        with pytest.raises(OutputError, match="base model"):
            merge(dora, tmp_path / "base", overwrite=True)
        assert (tmp_path / "base" / "config.json").is_file()

    def test_the_manifest_knows_it(self, dora, tmp_path) -> None:
        merge(dora, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["base"]["fingerprint"]

    def test_another_base_starts_a_merge_over(self, dora, tmp_path) -> None:
        from mergekit_lowrank import Registry
        from mergekit_lowrank.engine import identity_of

        first = identity_of(plan(dora), Registry(), ["cpu"], None)
        torch.manual_seed(1)
        model = llama()
        torch.nn.init.normal_(model.lm_head.weight)
        model.save_pretrained(tmp_path / "base")
        assert first["base"] != identity_of(plan(dora), Registry(), ["cpu"], None)["base"]


class TestMissing:
    def test_a_head_that_one_input_lacks(self, tmp_path) -> None:
        path = made(tmp_path, "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
        other = made(tmp_path, "b", target_modules=["q_proj"], seed=2)
        recipe = recipe_of(path, other, extras="average")
        assert plan(recipe)
        with pytest.raises(IncompatibleInputsError, match="missing: error"):
            plan(recipe | {"missing": "error"})


class Counter(torch.nn.Module):
    """A module with a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

    def forward(self, input_ids):
        return self.norm(self.body(input_ids))


@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_whole_numbers_stay_what_they_are(tmp_path, out_dtype) -> None:
    model = get_peft_model(Counter(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm"]))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(20_000_001)
    model.save_pretrained(tmp_path / "a")
    changes = {"out_dtype": out_dtype} if out_dtype else {}
    merge(recipe_of(tmp_path / "a", extras="average", **changes), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.norm.num_batches_tracked"]
    assert (found.dtype, found.item()) == (torch.int64, 20_000_001)


def test_a_bias_that_the_base_has_not_is_named(tmp_path) -> None:
    tied_llama().save_pretrained(tmp_path / "base")
    path = made(tmp_path, "a", tied_llama, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match="biases of lora_B"):
        plan(recipe_of(path, base_model=str(tmp_path / "base"), output={"kind": "model"}))
