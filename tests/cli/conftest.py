from __future__ import annotations

import pytest

from .builders import tensors, write_adapter, write_recipe


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory, no plugins but the built-in one, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", "all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def math(tmp_path):
    return write_adapter(tmp_path / "math", tensors(seed=1))


@pytest.fixture
def code(tmp_path):
    return write_adapter(tmp_path / "code", tensors(seed=2))


@pytest.fixture
def recipe(tmp_path, math, code):
    return write_recipe(tmp_path / "recipe.yaml", "math", "code")
