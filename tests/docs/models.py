"""The small adapters and models that the docs work on, for their tests and for ``docs/generate.py``."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergekit_lowrank.testing import write_tiny_adapter

MODULES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}.items()
}
PARAMETERS = {
    "model.embed_tokens.weight": (32, 8),
    **{f"{name}.weight": shape for name, shape in MODULES.items()},
    **{f"model.layers.{layer}.input_layernorm.weight": (8,) for layer in range(2)},
    "lm_head.weight": (32, 8),
}
LARGE = {
    "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
    "model.layers.0.mlp.down_proj.weight": (4096, 14336),
    "model.layers.0.input_layernorm.weight": (4096,),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write_models(directory: Path) -> None:
    """Write them: adapters, a base with fine-tunes, and models that are too large to be merged.

    ``math``, ``code`` and ``chat`` are adapters of ``base``, ``tuned-math`` and ``tuned-code`` its fine-tunes. Under
    ``large/`` lie models of one layer as wide as those of 8B, to be planned only.
    """
    for seed, (name, rank) in enumerate({"math": 4, "code": 2, "chat": 4}.items()):
        write_tiny_adapter(directory / name, MODULES, rank=rank, seed=seed, lora_alpha=0.1)
    for seed, name in enumerate(("base", "tuned-math", "tuned-code")):
        _write_model(directory / name, seed)
    for name in ("base", "math", "code"):
        _write_header(directory / "large" / name, LARGE)


def _write_model(directory: Path, seed: int) -> None:
    """A model with random weights; for a seed above 0 one that was tuned a little from that of 0."""
    first, own = (torch.Generator().manual_seed(number) for number in (0, seed))
    tensors = {name: torch.randn(shape, generator=first) for name, shape in PARAMETERS.items()}
    if seed:
        tensors = {name: weight + 0.1 * torch.randn(weight.shape, generator=own) for name, weight in tensors.items()}
    _write_config(directory)
    stored = {name: weight.bfloat16() for name, weight in tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.json").write_text("{}")


def _write_header(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A model in bfloat16 whose weights are a hole in the file: zeros that take no space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    _write_config(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _write_config(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
