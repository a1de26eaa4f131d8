"""Updates added to the weights of a base model, and fine-tunes merged into one: whole models in, a whole model out."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_lowrank import CheckpointError, IncompatibleInputsError, MemoryBudgetError, MergeError, OutputError, plan
from mergekit_lowrank import merge as merge_recipe
from mergekit_lowrank.events import ModuleMerged, Reporter
from mergekit_lowrank.formats import open_tensors
from mergekit_lowrank.testing import write_tiny_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in (("self_attn.q_proj", (32, 32)), ("self_attn.v_proj", (16, 32)), ("mlp.down_proj", (32, 48)))
}


def merge(*arguments, **options):
    return merge_recipe(*arguments, **options)


def llama(path, *, seed=0, dtype=torch.float32, change=None, shards=None, **config):
    """A tiny Llama on disk, the same for the same seed, its parameters changed by ``change``."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **config)).to(dtype)
    if change is not None:
        generator = torch.Generator().manual_seed(change)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.add_(noise.to(parameter.dtype))
    model.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
    return path


def tensors_of(directory):
    names = ("model.safetensors.index.json", "model.safetensors")
    source = open_tensors(next(directory / name for name in names if (directory / name).exists()))
    return {key: source.read(key) for key in source.specs}


def recipe_of(models, base, method="task_arithmetic", **keys):
    entries = [model if isinstance(model, dict) else {"model": str(model)} for model in models]
    keys = {"output": {"kind": "model"}, **keys}
    return {"merge_method": method, "models": entries, "base_model": str(base), **keys}


def logits(directory, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def delta_of(adapter, module, *, scaling):
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}"
    return scaling * factors[f"{prefix}.lora_B.weight"].double() @ factors[f"{prefix}.lora_A.weight"].double()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sharded base in bfloat16 and two adapters of it."""
    root = tmp_path_factory.mktemp("world")
    llama(root / "base", dtype=torch.bfloat16, shards="8KB", tie_word_embeddings=False)
    (root / "base" / "tokenizer.json").write_text("{}")
    for seed in (1, 2):
        write_tiny_adapter(root / f"adapter{seed}", MODULES, rank=4, seed=seed, lora_alpha=0.04)
    return root


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base, and three fine-tunes of it."""
    root = tmp_path_factory.mktemp("tuned")
    llama(root / "base", tie_word_embeddings=False)
    for seed in (1, 2, 3):
        llama(root / f"tune{seed}", change=seed, tie_word_embeddings=False, shards="40KB")
    return root


class TestAdapters:
    def test_every_weight_is_the_rounded_sum(self, world, tmp_path) -> None:
        models = [
            {"model": str(world / f"adapter{seed}"), "parameters": {"weight": weight}}
            for seed, weight in ((1, 0.7), (2, -0.4))
        ]
        merge(recipe_of(models, world / "base"), tmp_path / "out")
        before, after = tensors_of(world / "base"), tensors_of(tmp_path / "out")
        for module in MODULES:
            exact = before[f"{module}.weight"].double()
            for seed, weight in ((1, 0.7), (2, -0.4)):
                exact += weight * delta_of(world / f"adapter{seed}", module, scaling=0.01)
            rounded, found = exact.to(torch.bfloat16), after[f"{module}.weight"]
            # The sum is made in float32: it may lie on the other side of a rounding boundary, never further.
            assert (found.view(torch.int16).int() - rounded.view(torch.int16).int()).abs().max() <= 1
            assert (found == rounded).float().mean() > 0.999

    def test_what_no_input_changes_is_copied_byte_for_byte(self, world, tmp_path) -> None:
        merge(recipe_of([world / "adapter1"], world / "base"), tmp_path / "out")
        before, after = tensors_of(world / "base"), tensors_of(tmp_path / "out")
        assert list(before) == list(after)
        untouched = [key for key in before if key.removesuffix(".weight") not in MODULES]
        assert untouched
        assert all(before[key].dtype == after[key].dtype for key in before)
        assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in untouched)
        index = json.loads((world / "base" / "model.safetensors.index.json").read_text())["weight_map"]
        files = set(index.values()) - {index[f"{module}.weight"] for module in MODULES}
        assert files
        for name in files:
            assert (world / "base" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
        assert not list(tmp_path.glob(".out*"))

    def test_the_model_gives_the_logits_that_peft_gives(self, tmp_path) -> None:
        llama(tmp_path / "base")
        write_tiny_adapter(tmp_path / "adapter", MODULES, rank=4, lora_alpha=0.2)
        merge(recipe_of([tmp_path / "adapter"], tmp_path / "base"), tmp_path / "out")
        expected = logits(tmp_path / "base", tmp_path / "adapter")
        assert (logits(tmp_path / "base") - expected).abs().max() > 1e-3
        assert torch.allclose(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)

    def test_weights_stored_as_in_out_are_turned(self, tmp_path) -> None:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        # As peft names them; c_proj is square in the attention, where only the type of the layer tells.
        modules = {
            f"transformer.h.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in (("attn.c_attn", (96, 32)), ("attn.c_proj", (32, 32)), ("mlp.c_fc", (128, 32)))
        }
        adapter = write_tiny_adapter(tmp_path / "adapter", modules, rank=4, lora_alpha=0.2)
        stored = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(stored | {"fan_in_fan_out": True}))
        merge(recipe_of([adapter], tmp_path / "base"), tmp_path / "out")
        expected = logits(tmp_path / "base", adapter)
        assert torch.allclose(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)

    def test_tied_weights_stay_tied(self, tmp_path) -> None:
        llama(tmp_path / "base", tie_word_embeddings=True)
        write_tiny_adapter(tmp_path / "adapter", MODULES, rank=4)
        merge(recipe_of([tmp_path / "adapter"], tmp_path / "base"), tmp_path / "out")
        assert "lm_head.weight" not in tensors_of(tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    def test_a_rank_cuts_the_update_only_where_it_is_asked_for(self, tmp_path) -> None:
        llama(tmp_path / "base", dtype=torch.float64)
        write_tiny_adapter(tmp_path / "adapter", MODULES, rank=4, dtype=torch.float64)
        before = tensors_of(tmp_path / "base")
        for rank, expected in ((None, 4), (2, 2)):
            output = {"kind": "model"} | ({"rank": rank} if rank else {})
            merge(recipe_of([tmp_path / "adapter"], tmp_path / "base", output=output), tmp_path / f"out{rank}")
            after = tensors_of(tmp_path / f"out{rank}")
            for module in MODULES:
                delta = after[f"{module}.weight"] - before[f"{module}.weight"]
                assert torch.linalg.matrix_rank(delta, rtol=1e-9) == expected

    def test_dense_results_are_added_too(self, world, tmp_path) -> None:
        models = [world / "adapter1", world / "adapter2"]
        recipe = recipe_of(models, world / "base", "ties", out_dtype="float32", parameters={"density": 1.0})
        merge(recipe, tmp_path / "out")
        before, after = tensors_of(world / "base"), tensors_of(tmp_path / "out")
        for module in MODULES:
            deltas = torch.stack([delta_of(path, module, scaling=0.01).float() for path in models])
            agreeing = torch.where(deltas.sign() == deltas.sum(dim=0).sign(), deltas, 0)
            mean = agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
            expected = before[f"{module}.weight"].float() + mean
            assert torch.allclose(after[f"{module}.weight"], expected, rtol=1e-5, atol=1e-7)

    def test_the_type_and_the_size_of_files_are_the_recipes(self, world, tmp_path) -> None:
        output = {"kind": "model", "shard_size": "8KB"}
        recipe = recipe_of([world / "adapter1"], world / "base", output=output, out_dtype="float16")
        merge(recipe, tmp_path / "out")
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 3
        for shard in shards:
            with safe_open(shard, framework="pt") as stored:
                keys = list(stored.keys())
                assert all(stored.get_tensor(key).dtype == torch.float16 for key in keys)
            assert len(keys) == 1 or shard.stat().st_size < 9_000
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config.get("dtype") or config.get("torch_dtype")) == "float16"

    def test_the_manifest_lists_every_file(self, world, tmp_path) -> None:
        merge(recipe_of([world / "adapter1"], world / "base"), tmp_path / "out")
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        listed = {file["name"] for file in manifest["outputs"]}
        there = {path.name for path in (tmp_path / "out").iterdir()}
        assert there - listed == {"manifest.json", "report.html", "timings.json"}
        assert manifest["base"]["location"] == str(world / "base")
        merge(recipe_of([world / "adapter2"], world / "base"), tmp_path / "out", overwrite=True)

    def test_the_written_recipe_gives_the_same_model(self, world, tmp_path) -> None:
        merge(recipe_of([world / "adapter1"], world / "base"), tmp_path / "out")
        merge(tmp_path / "out" / "recipe.yaml", tmp_path / "again")
        first, second = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_adapters_under_two_prefixes_of_one_base_meet(self, tmp_path) -> None:
        llama(tmp_path / "base", dtype=torch.float64)
        bare = {name.removeprefix("model."): shape for name, shape in MODULES.items()}
        write_tiny_adapter(tmp_path / "adapter1", MODULES, rank=2, seed=1, dtype=torch.float64)
        write_tiny_adapter(tmp_path / "adapter2", bare, rank=2, seed=2, dtype=torch.float64)
        write_tiny_adapter(tmp_path / "same2", MODULES, rank=2, seed=2, dtype=torch.float64)
        outputs = []
        for second in ("adapter2", "same2"):
            models = [tmp_path / "adapter1", tmp_path / second]
            merge(recipe_of(models, tmp_path / "base", "linear"), tmp_path / f"with-{second}")
            outputs.append(tensors_of(tmp_path / f"with-{second}"))
        assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])

    @pytest.mark.parametrize("shard", [None, (0, 2)])
    def test_a_base_that_changes_meanwhile_is_an_error(self, world, tmp_path, shard) -> None:
        shutil.copytree(world / "base", tmp_path / "base")

        class Meddler(Reporter):
            name, summary = "meddler", "rewrites a file of the base"

            def handle(self, event):
                if isinstance(event, ModuleMerged):
                    path = next((tmp_path / "base").glob("model-*.safetensors"))
                    copy = path.with_name("copy")
                    copy.write_bytes(path.read_bytes())
                    copy.replace(path)  # at once: a file that shrinks is another error

        recipe = recipe_of([world / "adapter1"], tmp_path / "base")
        with pytest.raises(CheckpointError, match="changed while it was merged"):
            merge(recipe, tmp_path / "out", reporters=[Meddler()], shard=shard)
        assert not (tmp_path / "out").exists()


class TestRefusals:
    def test_modules_that_the_base_lacks(self, world, tmp_path) -> None:
        write_tiny_adapter(tmp_path / "adapter", {"model.layers.7.self_attn.q_proj": (32, 32)})
        with pytest.raises(CheckpointError, match=r"layers\.7\.self_attn\.q_proj"):
            plan(recipe_of([tmp_path / "adapter"], world / "base"))

    def test_another_base(self, world, tmp_path) -> None:
        write_tiny_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (32, 40)})
        with pytest.raises(IncompatibleInputsError, match="the inputs have 32 x 40, the base 32 x 32") as caught:
            plan(recipe_of([tmp_path / "adapter"], world / "base"))
        assert "base_model must be the model that the inputs were tuned from" in str(caught.value)

    def test_a_sum_beyond_the_stored_type(self, tmp_path) -> None:
        llama(tmp_path / "base", dtype=torch.float16)
        write_tiny_adapter(tmp_path / "adapter", MODULES, lora_alpha=1e7)
        with pytest.raises(OutputError, match="exceed the range of float16"):
            merge(recipe_of([tmp_path / "adapter"], tmp_path / "base"), tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]

    def test_an_output_that_holds_or_lies_in_the_base(self, world, tmp_path) -> None:
        shutil.copytree(world / "base", tmp_path / "models" / "base")
        for output in (tmp_path / "models" / "base" / "merged", tmp_path / "models"):
            with pytest.raises(OutputError, match="base model"):
                merge(recipe_of([world / "adapter1"], tmp_path / "models" / "base"), output, overwrite=True)

    def test_a_merge_into_memory(self, world) -> None:
        with pytest.raises(OutputError, match="gives a model; name an output"):
            merge(recipe_of([world / "adapter1"], world / "base"))

    def test_what_does_not_fit_into_memory_even_in_blocks(self, world) -> None:
        with pytest.raises(MemoryBudgetError, match="take fewer workers"):
            plan(recipe_of([world / "adapter1"], world / "base"), memory_bytes=1 << 20)


class TestFineTunes:
    def test_a_weighted_sum_is_exact_in_every_parameter(self, tuned, tmp_path) -> None:
        weights = {1: 0.5, 2: 0.8, 3: -0.3}
        models = [{"model": str(tuned / f"tune{s}"), "parameters": {"weight": w}} for s, w in weights.items()]
        merge(recipe_of(models, tuned / "base"), tmp_path / "out")
        base, after = tensors_of(tuned / "base"), tensors_of(tmp_path / "out")
        tunes = {seed: tensors_of(tuned / f"tune{seed}") for seed in weights}
        for key, own in base.items():
            exact = own.double() + sum(w * (tunes[s][key].double() - own.double()) for s, w in weights.items())
            assert torch.allclose(after[key].double(), exact, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_alone_comes_back_as_it_is(self, tmp_path, dtype) -> None:
        llama(tmp_path / "base", dtype=dtype)
        llama(tmp_path / "tune", dtype=dtype, change=1)
        merge(recipe_of([tmp_path / "tune"], tmp_path / "base"), tmp_path / "out")
        after = tensors_of(tmp_path / "out")
        for key, own in tensors_of(tmp_path / "tune").items():
            assert torch.allclose(after[key], own, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-7)

    @pytest.mark.parametrize("method", ["ties", "knots", "slerp", "dare_ties", "drm", "breadcrumbs"])
    def test_an_adapter_and_the_same_as_whole_weights_merge_alike(self, tmp_path, method) -> None:
        """``adapter1`` is merged as factors and as a fine-tune that has its delta in it."""
        llama(tmp_path / "base", dtype=torch.float64)
        modules = {name: shape for name, shape in MODULES.items() if "layers.0" in name}
        for seed in (1, 2):
            write_tiny_adapter(tmp_path / f"adapter{seed}", modules, rank=3, seed=seed, dtype=torch.float64)
        merge(recipe_of([tmp_path / "adapter1"], tmp_path / "base"), tmp_path / "whole" / "adapter1")
        parameters = {"t": 0.3} if method == "slerp" else {}
        outputs = []
        for number, first in enumerate((tmp_path / "adapter1", tmp_path / "whole" / "adapter1")):
            models = [first, tmp_path / "adapter2"]
            recipe = recipe_of(models, tmp_path / "base", method, parameters=parameters, dtype="float64")
            if number == 1:
                recipe["rules"] = [
                    {"match": "regex:norm|embed|lm_head|layers.1|k_proj|o_proj|gate|up_proj", "merge_method": "linear"}
                ]
            merge(recipe, tmp_path / f"out{number}")
            outputs.append(tensors_of(tmp_path / f"out{number}"))
        for key in outputs[0]:
            assert torch.allclose(outputs[0][key], outputs[1][key], rtol=1e-7, atol=1e-9), key

    def test_an_adapter_holds_their_norms_only_where_the_recipe_says_so(self, tuned) -> None:
        with pytest.raises(MergeError, match=r"'tune1' holds 5 tensors that are no low-rank factors: '.*layernorm.*"):
            plan(recipe_of([tuned / "tune1"], tuned / "base", output={"kind": "adapter", "rank": 4}))

    def test_an_adapter_of_them_needs_a_rank(self, tuned) -> None:
        with pytest.raises(MergeError, match="its update has full rank, as of DoRA and of fine-tunes") as caught:
            plan(recipe_of([tuned / "tune1"], tuned / "base", output={"kind": "adapter"}, extras="average"))
        assert "output: {kind: model}" in str(caught.value)

    @pytest.mark.parametrize("method", ["robustmerge", "core_ties"])
    def test_methods_of_factors_refuse_them_by_name(self, tuned, method) -> None:
        with pytest.raises(MergeError, match=rf"'{method}' in space '\w+' merges the factors of adapters"):
            plan(recipe_of([tuned / "tune1", tuned / "tune2"], tuned / "base", method))

    def test_the_model_loads_and_runs(self, tuned, tmp_path) -> None:
        merge(recipe_of([tuned / "tune1", tuned / "tune2"], tuned / "base", "drm"), tmp_path / "out")
        assert logits(tmp_path / "out").isfinite().all()

    def test_a_budget_that_sends_results_to_disk_changes_no_byte(self, tuned, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("mergekit_lowrank.engine.merging.SCRATCH_ABOVE_BYTES", 1024)
        for method in ("ties", "drm"):
            recipe = recipe_of([tuned / "tune1", tuned / "tune2"], tuned / "base", method)
            made = plan(recipe, workers=1)
            limit = made.overhead_bytes + max(m.peak_bytes for m in made.modules) - 1
            assert any(module.scratch_bytes for module in plan(recipe, workers=1, memory_bytes=limit).modules)
            merge(recipe, tmp_path / f"{method}-memory", workers=1)
            merge(recipe, tmp_path / f"{method}-disk", workers=1, memory_bytes=limit)
            one, other = (tensors_of(tmp_path / f"{method}-{where}") for where in ("memory", "disk"))
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_float8_base_is_added_to_and_rounded_once(tmp_path) -> None:
    llama(tmp_path / "base")
    stored = tensors_of(tmp_path / "base")
    cast = {key: t.to(torch.float8_e4m3fn) if key.endswith("proj.weight") else t for key, t in stored.items()}
    save_file(cast, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    write_tiny_adapter(tmp_path / "adapter", MODULES, rank=4, lora_alpha=0.2)
    merge(recipe_of([tmp_path / "adapter"], tmp_path / "base"), tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    for module in MODULES:
        key = f"{module}.weight"
        exact = cast[key].double() + delta_of(tmp_path / "adapter", module, scaling=0.05)
        assert after[key].dtype == torch.float8_e4m3fn
        assert torch.equal(after[key].float(), exact.float().to(torch.float8_e4m3fn).float())


def test_a_base_that_changes_on_disk_is_noticed_by_a_fingerprint(world, tmp_path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    before = plan(recipe_of([world / "adapter1"], tmp_path / "base")).fold.base.fingerprint
    shard = next((tmp_path / "base").glob("model-*.safetensors"))
    save_file(load_file(shard), shard, metadata={"format": "pt", "again": "yes"})
    assert plan(recipe_of([world / "adapter1"], tmp_path / "base")).fold.base.fingerprint != before
