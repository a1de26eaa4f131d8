"""A working directory like a user's: a clone's ``recipes``, and three small adapters called as the docs call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lowrank.testing import write_tiny_adapter
from tests.docs.pages import ROOT

MODULES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}.items()
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with ``recipes/``, ``math``, ``code`` and ``chat`` in it."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for seed, (name, rank) in enumerate({"math": 4, "code": 2, "chat": 4}.items()):
        write_tiny_adapter(tmp_path / name, MODULES, rank=rank, seed=seed)
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: math}, {model: code}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
