"""Adapters, base models and fine-tunes of stated shapes with random weights: no download, any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lowrank.formats import SafetensorsStream
from tests.benchmarks.shapes import Model, transformer

Shape = tuple[int, ...]

SIGMA = 0.02
"""Of the weights of a base."""
CHANGE = 0.002
"""Of what a fine-tune adds to them."""
BLOCK_ENTRIES = 1 << 22
"""Made at once."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama-like model; its output layer is tied to the embedding.

    Attributes:
        name: of its directories.
        layers: how many blocks.
        width: of the hidden states.
        keys: width of all keys and values.
        hidden: width of the MLP.
        words: of the vocabulary.
        head: width of one attention head.
    """

    name: str
    layers: int
    width: int
    keys: int
    hidden: int
    words: int
    head: int = 128

    @property
    def linear(self) -> Model:
        """Its linear layers, of which adapters are made."""
        return transformer(self.name, layers=self.layers, width=self.width, keys=self.keys, hidden=self.hidden)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of all tensors, in the order of a checkpoint."""
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.words, self.width)}
        modules = self.linear.modules
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {f"{name}.weight": shape for name, shape in modules.items() if name.startswith(prefix)}
            shapes |= {f"{prefix}{n}.weight": (self.width,) for n in ("input_layernorm", "post_attention_layernorm")}
        return {**shapes, "model.norm.weight": (self.width,)}

    @property
    def config(self) -> dict[str, object]:
        """As transformers reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // self.head,
            "num_key_value_heads": self.keys // self.head,
            "vocab_size": self.words,
            "tie_word_embeddings": True,
        }

    def narrowed(self, divisor: int) -> Llama:
        """The model with every width and the vocabulary divided."""
        sizes = ("width", "keys", "hidden", "words", "head")
        divided = {name: getattr(self, name) // divisor for name in sizes}
        return replace(self, name=f"{self.name}-narrowed-{divisor}", **divided)


LLAMA_70B = Llama("llama-3.1-70b", layers=80, width=8192, keys=1024, hidden=28672, words=128256)
LLAMA_3B = Llama("llama-3.2-3b", layers=28, width=3072, keys=1024, hidden=8192, words=128256)
LLAMA_500M = Llama("llama-0.5b", layers=10, width=2048, keys=512, hidden=5632, words=32000)
LLAMA_1B = Llama("llama-0.9b", layers=16, width=2048, keys=512, hidden=5632, words=32000)


def write_base(path: Path, model: Llama, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    """A model of normal weights (σ = 0.02, norms around 1); kept where it exists."""
    return _write_model(path, model, [torch.Generator().manual_seed(0)], dtype, shards)


def write_fine_tune(path: Path, model: Llama, seed: int, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same base with a normal change (σ = 0.002) of a seed above 0; kept where it exists."""
    return _write_model(path, model, [torch.Generator().manual_seed(s) for s in (0, seed)], dtype, 1)


def _write_model(
    path: Path, model: Llama, generators: Sequence[torch.Generator], dtype: torch.dtype, shards: int
) -> Path:
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    parts = _divided(model.shapes, shards)
    for number, part in enumerate(parts, start=1):
        tensors = {key: (dtype, shape) for key, shape in part.items()}
        with SafetensorsStream(path / _shard_name(number, shards), tensors, metadata={"format": "pt"}) as stream:
            for key, shape in part.items():
                for first, rows in _rows(shape, generators):
                    stream.write_rows(key, first, rows.to(dtype))
    if shards > 1:
        places = {key: _shard_name(number, shards) for number, part in enumerate(parts, start=1) for key in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {**model.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def _rows(shape: Shape, generators: Sequence[torch.Generator]) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows with their first row."""
    base, *changes = generators
    step = max(1, BLOCK_ENTRIES // shape[-1])
    for first in range(0, shape[0], step):
        size = (min(step, shape[0] - first), *shape[1:])
        rows = torch.randn(size, generator=base).mul_(SIGMA)
        for change in changes:
            rows += torch.randn(size, generator=change).mul_(CHANGE)
        yield first, rows if len(shape) > 1 else rows + 1


def _divided(shapes: dict[str, Shape], count: int) -> list[dict[str, Shape]]:
    """The tensors in ``count`` files of about the same size."""
    parts: list[dict[str, Shape]] = [{} for _ in range(count)]
    total, before = sum(map(_entries, shapes.values())), 0
    for key, shape in shapes.items():
        parts[before * count // total][key] = shape
        before += _entries(shape)
    return parts


def _entries(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
