"""Models as the shapes of their linear layers, and adapters of them: random factors of stated seeds, no base model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergekit_lowrank.formats import LINEAR, SafetensorsStream, config_text, output_config, tensor_names

Shape = tuple[int, int]
"""(d_out, d_in) of a module."""


@dataclass(frozen=True)
class Model:
    """Blocks of linear layers, all alike.

    Attributes:
        name: of the directories of its adapters.
        layers: how many blocks.
        shapes: of a block's linear layers.
    """

    name: str
    layers: int
    shapes: dict[str, Shape]

    @property
    def modules(self) -> dict[str, Shape]:
        """The shape of each module, by its name."""
        return {
            f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in self.shapes.items()
        }

    @property
    def counts(self) -> Counter[Shape]:
        """How many modules there are of each shape."""
        return Counter({shape: count * self.layers for shape, count in Counter(self.shapes.values()).items()})

    def with_layers(self, layers: int) -> Model:
        """The same blocks, so many of them."""
        return replace(self, layers=layers)

    def narrowed(self, divisor: int) -> Model:
        """The model with every width divided."""
        shapes = {name: (d_out // divisor, d_in // divisor) for name, (d_out, d_in) in self.shapes.items()}
        return replace(self, name=f"{self.name}-narrowed-{divisor}", shapes=shapes)


def transformer(name: str, *, layers: int, width: int, keys: int, hidden: int) -> Model:
    """A Llama-like model: ``keys`` is the width of its keys and values, ``hidden`` that of its MLP."""
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    return Model(name, layers, shapes)


LLAVA_7B = transformer("llava-7b", layers=32, width=4096, keys=4096, hidden=11008)
LLAMA_8B = transformer("llama-3.1-8b", layers=32, width=4096, keys=1024, hidden=14336)


def one_module(shape: Shape) -> Model:
    """A model of a single linear layer."""
    return Model(f"one-{shape[0]}x{shape[1]}", 1, {"mlp.up_proj": shape})


def square(width: int, *, layers: int = 1, modules: int = 7) -> Model:
    """``layers`` blocks of ``modules`` square modules."""
    return Model(f"square-{width}-x{modules}", layers, {f"mlp.m{i}_proj": (width, width) for i in range(modules)})


def write_adapter(path: Path, model: Model, *, rank: int, seed: int, dtype: torch.dtype = torch.float16) -> None:
    """One adapter of the model, of normal entries (σ = 0.02), alpha = 2 r."""
    path.mkdir(parents=True)
    tensors = {}
    for module, (d_out, d_in) in model.modules.items():
        a, b = tensor_names(module)
        tensors |= {a: (dtype, (rank, d_in)), b: (dtype, (d_out, rank))}
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsStream(path / "adapter_model.safetensors", tensors, metadata={"format": "pt"}) as stream:
        for name, (_, shape) in tensors.items():
            stream.write(name, (torch.randn(shape, generator=generator) * 0.02).to(dtype))
    config = output_config(
        base_model=f"{model.name}-shapes",
        revision=None,
        task_type=None,
        layouts=dict.fromkeys(model.modules, LINEAR),
        ranks=dict.fromkeys(model.modules, rank),
    )
    (path / "adapter_config.json").write_text(config_text({**config, "lora_alpha": 2 * rank}))


def write_set(root: Path, model: Model, *, inputs: int, rank: int, dtype: torch.dtype = torch.float16) -> list[str]:
    """The paths of ``inputs`` adapters with seeds 0, 1, …; those that exist are kept."""
    paths = [root / f"{model.name}-l{model.layers}-r{rank}-{seed}" for seed in range(inputs)]
    for seed, path in enumerate(paths):
        if not (path / "adapter_config.json").exists():
            write_adapter(path, model, rank=rank, seed=seed, dtype=dtype)
    return [str(path) for path in paths]
