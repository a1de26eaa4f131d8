"""A tiny BERT, adapters for it, and logits with and without a merged delta."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from mergekit_lowrank.formats import tensor_names
from mergekit_lowrank.testing import write_tiny_adapter

LAYERS, WIDTH, INNER = 2, 32, 48
MODULES = {
    f"encoder.layer.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "intermediate.dense": (INNER, WIDTH),
        "output.dense": (WIDTH, INNER),
    }.items()
}


def tiny_bert() -> torch.nn.Module:
    """The same small BERT each time, with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=INNER
    )
    return BertModel(config).eval()


def adapters(root: Path, count: int = 3, **options) -> list[Path]:
    """Adapters of the tiny BERT with seeds 1, 2, …"""
    options = {"rank": 3, "lora_alpha": 0.6, **options}
    return [write_tiny_adapter(root / f"expert{seed}", MODULES, seed=seed, **options) for seed in range(1, count + 1)]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Hidden states of a fixed batch."""
    ids = torch.arange(2, 26).reshape(2, 12)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def adapted_logits(path: Path, model: torch.nn.Module) -> torch.Tensor:
    """Those of the model with a PEFT adapter loaded by peft itself."""
    return logits(PeftModel.from_pretrained(model, path).eval())


@torch.no_grad()
def dense_logits(deltas: dict[str, torch.Tensor], model: torch.nn.Module) -> torch.Tensor:
    """Those of the model with W0 + delta in every module."""
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        weight.add_(delta.to(weight.dtype))
    return logits(model)


def stored_factors(path: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) of one module as stored."""
    tensors = load_file(path / "adapter_model.safetensors")
    a, b = tensor_names(module)
    return tensors[b], tensors[a]


def stored_config(path: Path) -> dict:
    """The adapter's configuration."""
    return json.loads((path / "adapter_config.json").read_text())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
