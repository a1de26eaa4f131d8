"""A working directory like a user's: a clone's ``recipes``, and small adapters and models as the docs call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.models import write_models
from tests.docs.pages import ROOT


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with ``recipes/``, ``recipe.yaml`` and what ``write_models`` writes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_models(tmp_path)
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: math}, {model: code}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
