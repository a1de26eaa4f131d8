"""A LoRA for llama.cpp: read back with the gguf package, and applied as llama.cpp does."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mergekit_lowrank.errors import CheckpointError, OutputError
from mergekit_lowrank.formats import Adapter, Embedding, PeftFormat, new_directory
from mergekit_lowrank.formats.gguf_names import ARCHITECTURES
from mergekit_lowrank.formats.gguf_output import GgufWriter
from mergekit_lowrank.testing import write_tiny_adapter

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS, HEAD_SIZE, WIDTH, VOCABULARY = 4, 2, 6, 10, 13
BASE = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "tie_word_embeddings": False,
}
SHAPES = {
    "model.layers.0.self_attn.q_proj": (HEADS * HEAD_SIZE, WIDTH),
    "model.layers.0.self_attn.k_proj": (KEY_HEADS * HEAD_SIZE, WIDTH),
    "model.layers.1.mlp.down_proj": (WIDTH, 16),
}
NAMES = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
}


def opened(path, **settings):
    return PeftFormat().open(write_tiny_adapter(path, settings.pop("modules", SHAPES), **settings), label="math")


def in_memory(tensors, **settings):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear", **settings}
    return Adapter({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, config).open(label="math")


def factors(module, *, rank=2, shape=(6, 5)):
    return {
        f"{module}.lora_A.weight": torch.ones(rank, shape[1]),
        f"{module}.lora_B.weight": torch.ones(shape[0], rank),
    }


def written(checkpoint, directory, base=BASE):
    with new_directory(directory) as partial:
        GgufWriter(base).write(checkpoint, partial)
    assert [path.name for path in directory.iterdir()] == ["adapter.gguf"]
    return gguf.GGUFReader(directory / "adapter.gguf")


def value(reader, key):
    return reader.fields[key].contents()


def tensors_of(reader):
    """Names to float32 matrices."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }


def to_llama_cpp(weight, heads):
    """Rows of a weight in llama.cpp's order, one by one: of each head first i, then i + half, for every i."""
    size = len(weight) // heads
    order = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return weight[order]


def applied(reader, weights):
    """W + alpha/rank · B A for each weight by its name, as ``build_lora_mm`` and ``build_inp_embd`` compute."""
    alpha, tensors, changed = value(reader, "adapter.lora.alpha"), tensors_of(reader), {}
    for name, weight in weights.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = np.float32(alpha) / np.float32(b.shape[1]) if alpha else 1.0
        delta = a @ b.T if name == "token_embd.weight" else b @ a
        changed[name] = weight + float(scale) * delta
    return changed


def assert_applied(checkpoint, reader, names, *, heads=None, tolerance=2e-6):
    for module, name in names.items():
        update = checkpoint.read(module)
        weight = torch.randn(update.shape, generator=torch.Generator().manual_seed(1))
        expected = weight + update.scaling * update.b.float() @ update.a.float()
        own = (heads or {}).get(module)
        reorder = (lambda matrix, own=own: to_llama_cpp(matrix, own)) if own else lambda matrix: matrix
        changed = applied(reader, {name: reorder(weight)})[name]
        torch.testing.assert_close(changed, reorder(expected), rtol=tolerance, atol=tolerance)


LLAMA_HEADS = {"model.layers.0.self_attn.q_proj": HEADS, "model.layers.0.self_attn.k_proj": KEY_HEADS}


def test_the_file_says_what_it_is(tmp_path):
    reader = written(opened(tmp_path / "math", rank=2, lora_alpha=2, base_model="org/base"), tmp_path / "out")
    assert value(reader, "general.type") == "adapter"
    assert value(reader, "adapter.type") == "lora"
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.name") == "math"
    assert value(reader, "general.base_model.0.name") == "base"
    assert value(reader, "general.base_model.0.repo_url") == "https://huggingface.co/org/base"
    assert value(reader, "adapter.lora.alpha") == 2
    expected = [f"{name}.lora_{side}" for name in NAMES.values() for side in "ab"]
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(expected)


def test_llama_cpp_applies_what_the_adapter_means(tmp_path):
    checkpoint = opened(tmp_path / "math", lora_alpha=16)
    assert_applied(checkpoint, written(checkpoint, tmp_path / "out"), NAMES, heads=LLAMA_HEADS)


def test_a_base_without_grouped_keys_has_one_number_of_heads(tmp_path):
    checkpoint = opened(tmp_path / "math", lora_alpha=16)
    base = {key: number for key, number in BASE.items() if key != "num_key_value_heads"}
    heads = dict.fromkeys(LLAMA_HEADS, HEADS)
    modules = {**SHAPES, "model.layers.0.self_attn.k_proj": (HEADS * HEAD_SIZE, WIDTH)}
    checkpoint = opened(tmp_path / "wide", modules=modules)
    assert_applied(checkpoint, written(checkpoint, tmp_path / "out", base), NAMES, heads=heads)


def test_qwen_is_not_reordered(tmp_path):
    checkpoint = opened(tmp_path / "math", lora_alpha=16)
    reader = written(checkpoint, tmp_path / "out", {**BASE, "model_type": "qwen2"})
    assert value(reader, "general.architecture") == "qwen2"
    assert_applied(checkpoint, reader, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_of_one_scaling_are_stored_bit_by_bit(tmp_path, dtype):
    checkpoint = opened(tmp_path / "math", lora_alpha=1.7, dtype=dtype)
    reader = written(checkpoint, tmp_path / "out", {**BASE, "model_type": "qwen3"})
    tensors = tensors_of(reader)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {str(dtype)[6:].upper().replace("LOAT", "")}
    for module, name in NAMES.items():
        update = checkpoint.read(module)
        assert torch.equal(tensors[f"{name}.lora_a"], update.a.float())
        assert torch.equal(tensors[f"{name}.lora_b"], update.b.float())


def test_another_scaling_by_a_power_of_two_is_exact_in_bfloat16(tmp_path):
    module = "model.layers.1.mlp.down_proj"
    checkpoint = opened(tmp_path / "math", lora_alpha=4, alphas={module: 32}, dtype=torch.bfloat16)
    reader = written(checkpoint, tmp_path / "out")
    assert value(reader, "adapter.lora.alpha") == 4
    stored = next(tensor for tensor in reader.tensors if tensor.name == f"{NAMES[module]}.lora_b")
    assert stored.tensor_type.name == "BF16"
    assert torch.equal(tensors_of(reader)[stored.name], 8 * checkpoint.read(module).b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_ranks_and_scalings_are_applied(tmp_path, dtype):
    module = "model.layers.0.self_attn.q_proj"
    checkpoint = opened(tmp_path / "math", lora_alpha=5, ranks={module: 3}, alphas={module: 7}, dtype=dtype)
    reader = written(checkpoint, tmp_path / "out")
    assert_applied(checkpoint, reader, NAMES, heads=LLAMA_HEADS)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types[f"{NAMES[module]}.lora_b"] == "F32"


def test_rslora_is_applied(tmp_path):
    checkpoint = opened(tmp_path / "math", rank=3, lora_alpha=4, use_rslora=True)
    reader = written(checkpoint, tmp_path / "out")
    assert value(reader, "adapter.lora.alpha") == pytest.approx(4 * math.sqrt(3), rel=1e-7)
    assert_applied(checkpoint, reader, NAMES, heads=LLAMA_HEADS)


def test_alpha_zero_writes_zeros_and_no_alpha_of_zero(tmp_path):
    checkpoint = opened(tmp_path / "math", lora_alpha=0)
    reader = written(checkpoint, tmp_path / "out")
    assert value(reader, "adapter.lora.alpha") != 0  # llama.cpp would read it as scaling 1
    assert_applied(checkpoint, reader, NAMES, heads=LLAMA_HEADS)


def test_an_embedding_is_stored_so_that_rows_of_a_are_looked_up(tmp_path):
    generator = torch.Generator().manual_seed(0)
    key_a, key_b = Embedding().names("model.embed_tokens")
    tensors = {
        key_a.removeprefix("base_model.model."): torch.randn(2, VOCABULARY, generator=generator),
        key_b.removeprefix("base_model.model."): torch.randn(WIDTH, 2, generator=generator),
    }
    checkpoint = in_memory(tensors, lora_alpha=3)
    reader = written(checkpoint, tmp_path / "out")
    stored = tensors_of(reader)
    assert stored["token_embd.weight.lora_a"].shape == (VOCABULARY, 2)
    assert stored["token_embd.weight.lora_b"].shape == (WIDTH, 2)
    assert_applied(checkpoint, reader, {"model.embed_tokens": "token_embd.weight"})


def test_the_output_layer_is_known(tmp_path):
    checkpoint = opened(tmp_path / "math", modules={"lm_head": (VOCABULARY, WIDTH)})
    assert_applied(checkpoint, written(checkpoint, tmp_path / "out"), {"lm_head": "output.weight"})


def test_fused_projections_of_phi3_have_their_names(tmp_path):
    modules = {"model.layers.0.self_attn.qkv_proj": (12, WIDTH), "model.layers.0.mlp.gate_up_proj": (8, WIDTH)}
    names = {
        "model.layers.0.self_attn.qkv_proj": "blk.0.attn_qkv.weight",
        "model.layers.0.mlp.gate_up_proj": "blk.0.ffn_up.weight",
    }
    checkpoint = opened(tmp_path / "math", modules=modules)
    assert_applied(checkpoint, written(checkpoint, tmp_path / "out", {**BASE, "model_type": "phi3"}), names)


def test_the_text_model_of_gemma3_is_found(tmp_path):
    checkpoint = opened(tmp_path / "math", modules={"model.language_model.layers.1.self_attn.q_proj": (12, WIDTH)})
    reader = written(checkpoint, tmp_path / "out", {"model_type": "gemma3", "text_config": BASE})
    assert value(reader, "general.architecture") == "gemma3"
    names = {"model.language_model.layers.1.self_attn.q_proj": "blk.1.attn_q.weight"}
    assert_applied(checkpoint, reader, names)


def test_every_known_type_has_an_architecture_in_gguf():
    assert {known.name for known in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_the_base_is_looked_for_where_the_adapter_says(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASE))
    reader = written(opened(tmp_path / "math", base_model=str(base)), tmp_path / "out", None)
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.base_model.0.name") == "base"
    assert "general.base_model.0.repo_url" not in reader.fields


@pytest.mark.parametrize("base_model", ["org/never-downloaded", "no/such/directory", ""])
def test_a_missing_base_is_asked_for(tmp_path, base_model):
    checkpoint = opened(tmp_path / "math", base_model=base_model)
    with pytest.raises(CheckpointError, match=r"is not on this machine. Give the base model's directory \(--base\)"):
        written(checkpoint, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds a list"), ("{", "is not readable as JSON")])
def test_a_broken_config_of_the_base_is_named(tmp_path, text, message):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        written(opened(tmp_path / "math", base_model=str(tmp_path / "base")), tmp_path / "out", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "of type 'mamba'.*Known types: gemma, gemma2, "),
        ({"model_type": None}, "of type None"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' of the base model is None"),
        ({"num_attention_heads": "4"}, "'num_attention_heads' of the base model is '4'"),
        ({"num_attention_heads": 5}, r"not heads of the base: .*q_proj' \(24 rows, 5 heads\)"),
        ({"num_hidden_layers": 1}, "does not know in a base of type 'llama': 'model.layers.1.mlp.down_proj'"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        written(opened(tmp_path / "math"), tmp_path / "out", {**BASE, **changes})


def test_unknown_modules_make_one_message(tmp_path):
    checkpoint = opened(tmp_path / "math", modules={f"tower.{i}.fc": (4, 4) for i in range(5)})
    with pytest.raises(CheckpointError, match=r"'tower.0.fc', 'tower.1.fc', 'tower.2.fc' and 2 more"):
        written(checkpoint, tmp_path / "out")


def test_two_modules_of_one_name_are_refused(tmp_path):
    names = ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj")
    checkpoint = opened(tmp_path / "math", modules=dict.fromkeys(names, (4, 4)))
    with pytest.raises(
        CheckpointError, match=r"one name in llama.cpp: 'model.*up_proj' \(blk.0.ffn_up.weight\), 'model"
    ):
        written(checkpoint, tmp_path / "out")


def test_a_directory_is_no_address_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    reader = written(opened(tmp_path / "math", base_model="models/base"), tmp_path / "out")
    assert value(reader, "general.base_model.0.name") == "base"
    assert "general.base_model.0.repo_url" not in reader.fields


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_tied_weights_are_refused(tmp_path, module):
    if module == "lm_head":
        tensors = factors(module)
    else:
        tensors = {f"{module}.lora_embedding_A": torch.ones(2, 5), f"{module}.lora_embedding_B": torch.ones(6, 2)}
    with pytest.raises(CheckpointError, match=f"input embedding and output layer at once.*'{module}'"):
        written(in_memory(tensors), tmp_path / "out", {**BASE, "tie_word_embeddings": True})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        ({"score.weight": torch.ones(2, 5)}, {"modules_to_save": ["score"]}, r"whole tensors.*'score.weight'"),
        ({f"{Q}.lora_B.bias": torch.ones(24)}, {"lora_bias": True}, r"biases \(lora_bias\).*q_proj.bias'"),
        ({f"{Q}.base_layer.bias": torch.ones(24)}, {"bias": "lora_only"}, "biases, which llama.cpp does not load"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(24)}, {"use_dora": True}, "not low-rank without the base"),
        (
            {"lm_head.base_layer.weight": torch.ones(13, 10)},
            {},
            "saved beside their factors.*'lm_head.weight'.*save_embedding_layers=False",
        ),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 10)},
            {"trainable_token_indices": {"model.embed_tokens": [3]}},
            "rows of embeddings",
        ),
        (
            {"conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(4, 2, 1, 1)},
            {},
            "factors of convolutions or fused experts.*'conv'",
        ),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path, extra, settings, message):
    checkpoint = in_memory({**factors(Q, shape=SHAPES[Q]), **extra}, **settings)
    with pytest.raises(CheckpointError, match=message):
        GgufWriter(BASE).check(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        written(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_check_reads_no_tensor(tmp_path):
    checkpoint = in_memory(
        {f"{Q}.lora_A.weight": torch.full((2, 10), math.nan), f"{Q}.lora_B.weight": torch.ones(24, 2)}
    )
    GgufWriter(BASE).check(checkpoint)
    with pytest.raises(CheckpointError, match="NaN"):
        written(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float64_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not compute with.*out_dtype: float32"):
        written(opened(tmp_path / "math", dtype=torch.float64), tmp_path / "out")


def test_a_product_that_overflows_is_refused(tmp_path):
    modules = [*SHAPES]
    tensors = {key: tensor for module in modules for key, tensor in factors(module, shape=SHAPES[module]).items()}
    tensors[f"{modules[2]}.lora_B.weight"] = torch.full((10, 2), 3e38)
    checkpoint = in_memory(tensors, alpha_pattern={modules[2]: 64})
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_down.weight.lora_b' overflows float32"):
        written(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(OutputError, match=r"pip install 'mergekit-lowrank\[gguf\]'"):
        GgufWriter()
