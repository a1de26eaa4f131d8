"""Random updates, and tiny adapters on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank.formats import tensor_names
from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["random_update", "random_updates", "write_tiny_adapter"]


def random_update(
    d_out: int,
    d_in: int,
    rank: int,
    seed: int = 0,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> LowRankUpdate:
    """A (d_out, d_in) update with normal entries in both factors, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return LowRankUpdate(b.to(dtype), a.to(dtype), scaling)


def random_updates(
    d_out: int,
    d_in: int,
    ranks: Sequence[int],
    seed: int = 0,
    *,
    scalings: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[LowRankUpdate]:
    """One random update of the same module for each rank; all scalings 1 unless given."""
    own = scalings if scalings is not None else (1.0,) * len(ranks)
    return [
        random_update(d_out, d_in, rank, seed * 1000 + t, scaling=scaling, dtype=dtype)
        for t, (rank, scaling) in enumerate(zip(ranks, own, strict=True))
    ]


def write_tiny_adapter(
    path: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    rank: int = 2,
    seed: int = 0,
    lora_alpha: float = 4,
    use_rslora: bool = False,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str = "tiny/base",
) -> Path:
    """The folder of a PEFT adapter with random factors, both of them non-zero.

    Args:
        path: the folder; made if it is missing.
        modules: (d_out, d_in) by module name.
        rank: of the modules that ``ranks`` does not name.
        seed: the same seed gives the same factors.
        lora_alpha: of the modules that ``alphas`` does not name.
        use_rslora: scaling α/√r instead of α/r.
        ranks: by module name, written as ``rank_pattern``.
        alphas: by module name, written as ``alpha_pattern``.
        dtype: of the stored factors.
        base_model: written as ``base_model_name_or_path``.
    """
    tensors: dict[str, Tensor] = {}
    for index, (module, (d_out, d_in)) in enumerate(modules.items()):
        update = random_update(d_out, d_in, (ranks or {}).get(module, rank), seed * 1000 + index, dtype=dtype)
        key_a, key_b = tensor_names(module)
        tensors |= {key_a: update.a, key_b: update.b}
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "target_modules": list(modules),
        "r": rank,
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": dict(alphas or {}),
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, path / "adapter_model.safetensors")
    return path
