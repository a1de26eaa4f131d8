"""Inputs whose measures are known: singular directions are chosen, and hidden in factors that do not show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lowrank import Adapter
from mergekit_lowrank.diagnostics import Diagnosis, ModuleDiagnosis, diagnose
from mergekit_lowrank.formats import tensor_names
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.testing import random_update, write_tiny_adapter

MODULE = "model.layers.3.mlp.up_proj"
D_OUT, D_IN, RANK = 26, 22, 2
SCALING = 2.0


def basis(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float64, orthonormal."""
    return torch.linalg.qr(random_update(rows, 1, columns, seed, dtype=torch.float64).b).Q


LEFT, RIGHT = basis(D_OUT, 12, 0), basis(D_IN, 12, 1)


def update_of(left: Tensor, values: Sequence[float], right: Tensor) -> LowRankUpdate:
    """left · diag(values) · rightᵀ, in float64."""
    count = len(values)
    mixed = random_update(count, count, count, 7, dtype=torch.float64).b + 2 * torch.eye(count, dtype=torch.float64)
    b = left * torch.tensor(values, dtype=torch.float64) @ mixed
    return LowRankUpdate(b / SCALING, torch.linalg.solve(mixed, right.T), SCALING)


def along(first: int, values: Sequence[float] = (4, 1)) -> LowRankUpdate:
    """That along two of the chosen directions, from ``first`` on."""
    return update_of(LEFT[:, first : first + 2], values, RIGHT[:, first : first + 2])


def adapter(updates: Mapping[str, LowRankUpdate], dtype: torch.dtype) -> Adapter:
    """An adapter in memory."""
    tensors = {}
    for module, update in updates.items():
        key_a, key_b = tensor_names(module)
        tensors |= {key_a: update.a.to(dtype), key_b: (update.b * (update.scaling / SCALING)).to(dtype)}
    rank = max(update.rank for update in updates.values())
    patterns = {module: update.rank for module, update in updates.items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": SCALING * rank,
        "rank_pattern": patterns,
        "alpha_pattern": {module: SCALING * own for module, own in patterns.items()},
    }
    return Adapter(tensors, config)


def diagnosed(
    updates: Mapping[str, LowRankUpdate],
    *,
    dtype: torch.dtype = torch.float64,
    method: str = "task_arithmetic",
    weights: Mapping[str, float] | None = None,
    **keys: object,
) -> Diagnosis:
    """The diagnosis of one module's updates. They have names here only: adapters in memory are numbered."""
    return diagnosed_modules({MODULE: updates}, dtype=dtype, method=method, weights=weights, **keys)


def diagnosed_modules(
    modules: Mapping[str, Mapping[str, LowRankUpdate]],
    *,
    dtype: torch.dtype = torch.float64,
    method: str = "task_arithmetic",
    weights: Mapping[str, float] | None = None,
    **keys: object,
) -> Diagnosis:
    """The diagnosis of updates by module and name."""
    labels = list(dict.fromkeys(label for updates in modules.values() for label in updates))
    models = [
        {
            "model": adapter({m: updates[label] for m, updates in modules.items() if label in updates}, dtype),
            "parameters": {"weight": (weights or {}).get(label, 1.0)},
        }
        for label in labels
    ]
    name = str(dtype).removeprefix("torch.")
    return diagnose({"merge_method": method, "models": models, "dtype": name, **keys}, executor="serial")


def measured(updates: Mapping[str, LowRankUpdate], **options: object) -> ModuleDiagnosis:
    """The one module of a diagnosis."""
    return diagnosed(updates, **options).modules[0]  # type: ignore[arg-type]


def write_adapters(
    root: Path, *, layers: int, inputs: int = 3, shape: tuple[int, int] = (24, 20), rank: int = 4
) -> list[str]:
    """Random adapters on disk; the last one lacks the first module."""
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in ("q_proj", "v_proj")]
    paths = []
    for seed in range(inputs):
        own = dict.fromkeys(names[1:] if seed and seed == inputs - 1 else names, shape)
        paths.append(str(write_tiny_adapter(root / f"adapter{seed}", own, rank=rank, seed=seed + 1)))
    return paths


def zeroed(path: str, modules: Sequence[str]) -> None:
    """Set B of some modules of an adapter on disk to zero."""
    file = Path(path) / "adapter_model.safetensors"
    tensors = load_file(file)
    for module in modules:
        tensors[tensor_names(module)[1]].zero_()
    save_file(tensors, file)
