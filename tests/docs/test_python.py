from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks

PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" and block.is_run for block in blocks(page))]


def install(page: Path, directory: Path) -> list[str]:
    """Write the page's files and its entry points, as an installed distribution has them; the modules' names."""
    modules = []
    for block in blocks(page):
        name = block.argument("file")
        if name:
            (directory / name).write_text(block.text, encoding="utf-8")
            modules.append(Path(name).stem)
        if block.language == "toml" and modules:
            metadata = directory / f"{modules[-1]}-1.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {modules[-1]}\nVersion: 1.0\n")
            lines = re.sub(r'(\S+) = "(\S+)"', r"\1 = \2", block.text.replace("project.entry-points.", ""))
            (metadata / "entry_points.txt").write_text(lines)
    return modules


def run(block: Block, namespace: dict[str, Any]) -> None:
    # The lines of an error are those of the page.
    text = "\n" * block.line + block.text
    exec(compile(text, str(block.page), "exec"), namespace)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = install(page, workplace)
    monkeypatch.syspath_prepend(workplace)
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks(page):
            if block.language == "python" and block.is_run and block.argument("file") is None:
                run(block, namespace)
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def test_the_plugin_of_the_readme_is_found_by_its_entry_point(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lowrank import Registry, merge

    modules = install(ROOT / "README.md", workplace)
    monkeypatch.syspath_prepend(workplace)
    try:
        registry = Registry.load()
        assert registry.owner("strategies", "median") == "median"
        models = [{"model": "math"}, {"model": "code"}, {"model": "chat"}]
        assert merge({"merge_method": "median", "models": models}, registry=registry).report.totals.merged_norm > 0
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def test_the_plugin_of_the_readme_has_fifteen_lines() -> None:
    (block,) = [block for block in blocks(ROOT / "README.md") if block.argument("file")]
    assert len(block.text.splitlines()) <= 15
