"""Small recipes over tiny adapters."""

from __future__ import annotations

from pathlib import Path

from mergekit_lowrank.testing import write_tiny_adapter

MODULES = {
    "model.layers.0.self_attn.q_proj": (12, 10),
    "model.layers.0.mlp.down_proj": (10, 16),
    "model.layers.1.self_attn.q_proj": (12, 10),
    "model.layers.2.self_attn.q_proj": (12, 10),
}


def adapters(root: Path, count: int = 2, modules=MODULES, **options) -> list[str]:
    """Paths of ``count`` adapters with seeds 1, 2, …"""
    return [
        str(write_tiny_adapter(root / f"adapter{seed}", modules, seed=seed, **options)) for seed in range(1, count + 1)
    ]


def recipe_of(paths, method: str = "linear", **keys) -> dict:
    """A recipe over paths, or over (path, parameters) pairs."""
    models = [{"model": path} if isinstance(path, str) else {"model": path[0], "parameters": path[1]} for path in paths]
    return {"merge_method": method, "models": models, **keys}
