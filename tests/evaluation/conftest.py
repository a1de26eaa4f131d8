from __future__ import annotations

import sys
import textwrap

import pytest

from tests.cli.builders import tensors, write_adapter, write_recipe

JUDGE = """
import json
from pathlib import Path

calls = []
RIGHT = {"math": [1, 1, 1, 0] * 8, "code": [1, 0, 1, 1] * 8}
MERGED = [1, 1, 0, 0] * 8
BASE = [0, 1, 0, 0] * 8


def judge(adapter, base, *, task, fails=False):
    calls.append((task, adapter and adapter.name, base))
    if fails:
        raise ValueError("no such benchmark")
    if adapter is None:
        return BASE
    return RIGHT[adapter.name] if adapter.name in RIGHT else MERGED
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Two adapters and a recipe, and a module of evaluators that counts its calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", "all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for seed, name in enumerate(("math", "code")):
        write_adapter(tmp_path / name, tensors(seed=seed))
    write_recipe(tmp_path / "recipe.yaml", "math", "code")
    (tmp_path / "judging.py").write_text(textwrap.dedent(JUDGE))
    yield tmp_path
    sys.modules.pop("judging", None)


@pytest.fixture
def write_tasks(workplace):
    """Writes a tasks file."""

    def write(text, name="tasks.yaml"):
        path = workplace / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def tasks(write_tasks):
    return write_tasks(
        """
        tasks:
          sums: &judge
            expert: math
            python: judging:judge
            arguments: {task: "{task}"}
          loops: {<<: *judge, expert: code}
          chess: {<<: *judge, expert: null}
        """
    )
