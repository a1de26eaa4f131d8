"""Tiny adapters for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank.formats import tensor_names

MODULES = ("layers.0.q", "layers.0.v", "layers.1.q")


def config(**changes: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **changes}


def state_dict(
    modules: Sequence[str] = MODULES,
    *,
    rank: int = 2,
    d_out: int = 5,
    d_in: int = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        key_a, key_b = tensor_names(module)
        tensors[key_a] = torch.randn(rank, d_in, generator=generator).to(dtype)
        tensors[key_b] = torch.randn(d_out, rank, generator=generator).to(dtype)
    return tensors


def write_adapter(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(dict(tensors), path / "adapter_model.safetensors")
    return path


def write_model(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object] | None = None) -> Path:
    """A model directory of one safetensors file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} if settings is None else settings))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors")
    return path


def weights(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters of each kind."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (7, 4),
        "model.layers.0.attn.q_proj.weight": (6, 4),
        "model.layers.0.attn.q_proj.bias": (6,),
        "model.layers.0.conv.weight": (3, 2, 2),
        "model.norm.weight": (4,),
        "lm_head.weight": (7, 4),
    }
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


P = "base_model.model."


def variants() -> dict[str, tuple[dict[str, Tensor], dict[str, object]]]:
    """The tensors and the configuration of an adapter of each kind that is read without its base."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    factors = state_dict()
    experts = {f"{P}mlp.experts.lora_A.weight": normal(6, 4), f"{P}mlp.experts.lora_B.weight": normal(5, 6)}
    return {
        "linear": (factors, config()),
        "rslora": (factors, config(use_rslora=True)),
        "patterns": (
            {**factors, **state_dict(["layers.1.v"], rank=3)},
            config(rank_pattern={"layers.1.v": 3}, alpha_pattern={"v": 7}),
        ),
        "embedding": (
            {**factors, f"{P}e.lora_embedding_A": normal(2, 7), f"{P}e.lora_embedding_B": normal(3, 2)},
            config(),
        ),
        "convolutions": (
            {
                f"{P}one.lora_A.weight": normal(2, 4, 3),
                f"{P}one.lora_B.weight": normal(5, 2, 1),
                f"{P}three.lora_A.weight": normal(2, 1, 2, 2, 3),
                f"{P}three.lora_B.weight": normal(6, 2, 1, 1, 1),
            },
            config(target_modules=["one", "three"]),
        ),
        "lora_bias": (
            {**factors, **{f"{P}{module}.lora_B.bias": normal(5) for module in MODULES}},
            config(lora_bias=True),
        ),
        "biases": (
            {**factors, f"{P}layers.0.q.base_layer.bias": normal(5), f"{P}layers.0.o.bias": normal(4).half()},
            config(bias="all"),
        ),
        "modules_to_save": (
            {**factors, f"{P}head.weight": normal(6, 3), f"{P}norm.weight": normal(3).bfloat16()},
            config(modules_to_save=["head", "norm"]),
        ),
        "token_rows": (
            {**factors, f"{P}e.token_adapter.trainable_tokens_delta": normal(3, 4)},
            config(trainable_token_indices={"e": [1, 4, 6]}),
        ),
        "experts": (
            {**factors, **experts},
            config(target_parameters=["mlp.experts.down_proj"]),
        ),
    }
