"""Adapters of stated shapes and seeds, for benchmarks: random factors, no base model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mergekit_lowrank.formats import SafetensorsStream, config_text, output_config, tensor_names

LLAVA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
"""(d_out, d_in) of the linear layers of a LLaVA-1.5-7B block."""


def write_adapter(path: Path, *, layers: int, rank: int, seed: int, dtype: torch.dtype = torch.float16) -> None:
    """One adapter with the shapes of LLaVA-7B and ``layers`` of its 32 layers, alpha = 2 r."""
    path.mkdir(parents=True)
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in LLAVA_7B.items()}
    tensors = {}
    for module, (d_out, d_in) in modules.items():
        a, b = tensor_names(module)
        tensors |= {a: (dtype, (rank, d_in)), b: (dtype, (d_out, rank))}
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsStream(path / "adapter_model.safetensors", tensors, metadata={"format": "pt"}) as stream:
        for name, (_, shape) in tensors.items():
            stream.write(name, (torch.randn(shape, generator=generator) * 0.02).to(dtype))
    config = output_config(
        base_model="llava-7b-shapes", revision=None, task_type=None, modules=list(modules), rank=rank
    )
    (path / "adapter_config.json").write_text(config_text({**config, "lora_alpha": 2 * rank}))


def write_set(root: Path, *, inputs: int, layers: int, rank: int) -> list[Path]:
    """``inputs`` adapters with seeds 0, 1, …; existing ones are kept."""
    paths = [root / f"llava7b-l{layers}-r{rank}-{seed}" for seed in range(inputs)]
    for seed, path in enumerate(paths):
        if not (path / "adapter_config.json").exists():
            write_adapter(path, layers=layers, rank=rank, seed=seed)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    write_set(args.root, inputs=args.inputs, layers=args.layers, rank=args.rank)
