"""Valid inputs of a few bytes each: what is mutated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing.contents import Content, Json, Pickled, Sample, Tensors

__all__ = ["BASE", "CARDS", "DIFFUSION", "FINE_TUNES", "LLAVA", "LORAS", "PICKLES", "RECIPES", "SHARDED", "TOKENIZERS"]
__all__ += ["VARIANTS", "WEIGHT_FILES"]

_PREFIX = "base_model.model."
_Q, _V, _TABLE = "model.layers.0.q_proj", "model.layers.0.v_proj", "model.embed_tokens"


def _values(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, max(1, math.prod(shape))).reshape(shape)


def _tensors(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"{_PREFIX}{name}": _values(*shape).to(dtype) for name, shape in shapes.items()}


def _pair(module: str, rank: int = 2, d_out: int = 4, d_in: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": (rank, d_in), f"{module}.lora_B.weight": (d_out, rank)}


def _config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **changes}


def _adapter(tensors: Mapping[str, Tensor], **config: Any) -> Sample:
    return {"adapter_config.json": Json(_config(**config)), "adapter_model.safetensors": Tensors(tensors)}


_LINEAR = {**_pair(_Q), **_pair(_V)}
_SAVED = {"lm_head.weight": (6, 3), "model.norm.weight": (3,), f"{_Q}.base_layer.bias": (4,)}
_FACTORS: Mapping[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "linear": (_LINEAR, {"target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        {**_pair(_Q, 1), **_pair(_V)},
        {"use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"0.*v_proj": 3.5}},
    ),
    "embedding": (
        {**_pair(_Q), f"{_TABLE}.lora_embedding_A": (2, 6), f"{_TABLE}.lora_embedding_B": (3, 2)},
        {"fan_in_fan_out": False},
    ),
    "convolutions": (
        {
            "one.lora_A.weight": (2, 3, 3),
            "one.lora_B.weight": (4, 2, 1),
            "two.lora_A.weight": (2, 3, 2, 2),
            "two.lora_B.weight": (4, 2, 1, 1),
            "three.lora_A.weight": (2, 1, 2, 1, 2),
            "three.lora_B.weight": (2, 2, 1, 1, 1),
        },
        {},
    ),
    "lora_bias": ({**_LINEAR, f"{_Q}.lora_B.bias": (4,)}, {"lora_bias": True}),
    "dora": (
        {**_LINEAR, f"{_Q}.lora_magnitude_vector": (4,), f"{_V}.lora_magnitude_vector": (4,)},
        {"use_dora": True},
    ),
    "saved": ({**_LINEAR, **_SAVED}, {"modules_to_save": ["lm_head", "norm"], "bias": "all"}),
    "token_rows": (
        {**_pair(_Q), f"{_TABLE}.token_adapter.trainable_tokens_delta": (2, 3)},
        {"trainable_token_indices": {"embed_tokens": [1, 4]}},
    ),
    "experts": (
        {
            **_pair(_Q),
            "model.layers.0.mlp.experts.base_layer.lora_A.weight": (6, 3),
            "model.layers.0.mlp.experts.base_layer.lora_B.weight": (4, 6),
            "model.layers.0.mlp.experts.lora_A.weight": (6, 2),
            "model.layers.0.mlp.experts.lora_B.weight": (3, 6),
        },
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}

LORAS: tuple[Sample, ...] = (
    *(_adapter(_tensors(shapes), **config) for shapes, config in _FACTORS.values()),
    _adapter(_tensors(_LINEAR, torch.bfloat16)),
)

_VARIANTS: Mapping[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "VERA": (
        {
            f"{_Q}.vera_lambda_b": (4,),
            f"{_Q}.vera_lambda_d": (2,),
            f"{_V}.vera_lambda_b": (4,),
            f"{_V}.vera_lambda_d": (2,),
        },
        {"r": 2, "save_projection": True, "projection_prng_key": 0},
    ),
    "LOHA": (
        {
            **{f"{_Q}.hada_w{i}_a": (4, 2) for i in (1, 2)},
            **{f"{_Q}.hada_w{i}_b": (2, 3) for i in (1, 2)},
            **{f"conv.hada_w{i}_a": (2, 4) for i in (1, 2)},
            **{f"conv.hada_w{i}_b": (2, 3) for i in (1, 2)},
            **{f"conv.hada_t{i}": (2, 2, 3, 3) for i in (1, 2)},
        },
        {"r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {"q_proj": 1}},
    ),
    "LOKR": (
        {
            f"{_Q}.lokr_w1": (2, 3),
            f"{_Q}.lokr_w2_a": (2, 2),
            f"{_Q}.lokr_w2_b": (2, 1),
            "one.lokr_w1": (2, 1),
            "one.lokr_w2": (2, 3, 3),
            "two.lokr_w1_a": (2, 2),
            "two.lokr_w1_b": (2, 1),
            "two.lokr_t2": (2, 2, 2, 2),
            "two.lokr_w2_a": (2, 2),
            "two.lokr_w2_b": (2, 3),
        },
        {"r": 2, "alpha": 4, "decompose_both": True},
    ),
    "ADALORA": (
        {f"{_Q}.lora_A": (2, 3), f"{_Q}.lora_B": (4, 2), f"{_Q}.lora_E": (2, 1), "lm_head.weight": (6, 3)},
        {"r": 2, "init_r": 4, "lora_alpha": 8, "rank_pattern": {f"{_Q}.lora_E": [True, False, True, False]}},
    ),
}


def _variant(kind: str) -> Sample:
    shapes, config = _VARIANTS[kind]
    tensors = _tensors(shapes)
    if kind == "VERA":
        tensors |= {"base_model.vera_A": _values(2, 3), "base_model.vera_B": _values(4, 2)}
    return {"adapter_config.json": Json({"peft_type": kind, **config}), "adapter_model.safetensors": Tensors(tensors)}


VARIANTS: tuple[Sample, ...] = tuple(map(_variant, _VARIANTS))

PICKLES: tuple[Sample, ...] = tuple(
    {"adapter_config.json": Json(_config(**config)), "adapter_model.bin": Pickled(_tensors(shapes), is_zipped)}
    for shapes, config in (_FACTORS["linear"], _FACTORS["saved"], _FACTORS["embedding"])
    for is_zipped in (True, False)
)

LLAVA: tuple[Sample, ...] = tuple(
    {
        "adapter_config.json": Json(_config()),
        "config.json": Json({"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}),
        "adapter_model.bin": Pickled(_tensors(_LINEAR, torch.bfloat16), is_zipped),
        "non_lora_trainables.bin": Pickled(
            {f"base_model.model.model.mm_projector.{leaf}.weight": _values(3, 2) for leaf in (0, 2)}, is_zipped
        ),
    }
    for is_zipped in (True, False)
)


def _shards(stem: str, suffix: str, tensors: Mapping[str, Tensor]) -> dict[str, Content]:
    """Two shards and their index."""
    names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    wrap = Tensors if suffix == "safetensors" else Pickled
    index = Json({"metadata": {"total_size": 96}, "weight_map": where})
    return {f"{stem}.{suffix}.index.json": index, **dict(zip(names, map(wrap, halves), strict=True))}


SHARDED: tuple[Sample, ...] = tuple(
    {"adapter_config.json": Json(_config()), **_shards("adapter_model", suffix, _tensors(_LINEAR))}
    for suffix in ("safetensors", "bin")
)

BASE: Mapping[str, tuple[int, ...]] = {
    f"{_TABLE}.weight": (6, 3),
    f"{_Q}.weight": (4, 3),
    f"{_Q}.bias": (4,),
    f"{_V}.weight": (4, 3),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 4, 3),
    "model.layers.0.mlp.experts.down_proj": (3, 3, 2),
    "one.weight": (4, 3, 3),
    "two.weight": (4, 3, 2, 2),
    "three.weight": (2, 1, 2, 1, 2),
    "conv.weight": (4, 3, 3, 3),
    "model.norm.weight": (3,),
    "lm_head.weight": (6, 3),
}
"""The parameters of the base of all of them, and their shapes."""

_MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
_WEIGHTS = {name: _values(*shape) for name, shape in BASE.items()}

FINE_TUNES: tuple[Sample, ...] = (
    {"config.json": Json(_MODEL), "model.safetensors": Tensors(_WEIGHTS, {"format": "pt"})},
    {"config.json": Json({**_MODEL, "model_type": "gpt2"}), "pytorch_model.bin": Pickled(_WEIGHTS)},
    {"config.json": Json({**_MODEL, "quantization_config": None}), **_shards("model", "safetensors", _WEIGHTS)},
    {"config.json": Json(_MODEL), **_shards("pytorch_model", "bin", _WEIGHTS)},
)

_ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn1"
_KOHYA = {
    f"lora_unet_{_ATTENTION}_to_q.lora_down.weight": _values(2, 4),
    f"lora_unet_{_ATTENTION}_to_q.lora_up.weight": _values(6, 2),
    f"lora_unet_{_ATTENTION}_to_q.alpha": torch.tensor(1.0),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": _values(2, 3, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": _values(2, 2, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": _values(4, 2, 1, 1),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": _values(4, 2),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_b": _values(2, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w2_a": _values(4, 2),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w2_b": _values(2, 3),
}
_FLUX = {
    f"lora_unet_double_blocks_0_img_attn_qkv.{leaf}": _values(*shape)
    for leaf, shape in {"lora_down.weight": (2, 5), "lora_up.weight": (12, 2)}.items()
}
_DIFFUSERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": _values(2, 4),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": _values(6, 2),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": _values(2, 3),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": _values(8, 2),
}
_METADATA = {"ss_network_dim": "2", "ss_network_alpha": "1.0", "modelspec.title": "x", "ss_base_model_version": "sd_v1"}
_PEFT_METADATA = (
    '{"unet.r": 2, "unet.lora_alpha": 4, '
    '"text_encoder.r": 2, "text_encoder.lora_alpha": 2, "text_encoder.rank_pattern": {}}'
)

DIFFUSION: tuple[Sample, ...] = (
    {"lora.safetensors": Tensors(_KOHYA, _METADATA)},
    {"lora.safetensors": Tensors(_FLUX)},
    {"pytorch_lora_weights.safetensors": Tensors(_DIFFUSERS, {"lora_adapter_metadata": _PEFT_METADATA})},
)

_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": [["a", "a"]]},
}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "added_tokens_decoder": {"0": {"content": "<s>"}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool", "template": "{{ tools }}"}],
}
TOKENIZERS: tuple[Sample, ...] = (
    {
        "tokenizer.json": Json(_TOKENIZER),
        "tokenizer_config.json": Json(_TOKENIZER_CONFIG),
        "special_tokens_map.json": Json({"bos_token": "<s>"}),
        "chat_template.jinja": b"{{ messages }}",
        "chat_template.json": Json({"chat_template": "{{ messages }}"}),
        "vocab.json": Json({"a": 0}),
        "merges.txt": b"#version\na b\n",
    },
)

_CARD = b"""---
license: other
license_name: llama3
license_link: https://example.com/licence
pipeline_tag: text-generation
tags: [lora, &a peft]
model-index:
  - name: x
    results: [{task: *a, value: 0.5}]
---
# A model
"""
CARDS: tuple[Sample, ...] = (
    {"README.md": _CARD},
    {"README.md": b"---\r\nlicense: mit\r\n---\r\n"},
    {"README.md": b"# x\n"},
)

_RECIPE = b"""merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: {file: weights.csv}
  - model: &b org/name@main
    parameters: {weight: [0.5, 1, 2], density: [{filter: q_proj, value: 0.5}, {value: 1}]}
  - {model: *b, parameters: {weight: 0.5}}
rules:
  - match: 'glob:*.mlp.*'
    parameters: {density: 0.3}
output: {rank: {energy: 0.9}, format: peft}
dtype: float32
extras: average
execution: {memory: 2GiB, workers: 2}
"""
_WEIGHTS_CSV = b'pattern,value\nq_proj,0.5\n"glob:*.mlp.{a,b}",-1\n"re:.*[02].q",1e-2\n*,2\n'

RECIPES: tuple[Sample, ...] = ({"recipe.yaml": _RECIPE, "weights.csv": _WEIGHTS_CSV},)
WEIGHT_FILES: tuple[Sample, ...] = ({"weights.csv": _WEIGHTS_CSV},)
