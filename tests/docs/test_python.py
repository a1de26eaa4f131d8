from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributions import Environment, entry_points_in, write_metadata
from tests.docs.pages import PAGES, ROOT, Block, blocks

PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" and block.is_run for block in blocks(page))]


def install(page: Path, directory: Path) -> list[str]:
    """Write the page's files and its entry points, as an installed distribution has them; the modules' names."""
    modules = []
    for block in blocks(page):
        name = block.argument("file")
        if name:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(block.text, encoding="utf-8")
            modules.append(Path(name).stem)
        elif block.language == "toml" and modules:
            write_metadata(directory, modules[-1], "1.0", entry_points_in(block.text))
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

    Environment(workplace, monkeypatch)
    modules = install(ROOT / "README.md", workplace)
    try:
        registry = Registry.load()
        assert registry.plugins[1].registers == {"strategies": ("trimmed_mean",)}
        models = [{"model": "math"}, {"model": "code"}, {"model": "chat"}]
        merged = merge({"merge_method": "trimmed_mean", "models": models, "space": "core"}, registry=registry)
        assert merged.report.totals.merged_norm > 0
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def test_the_plugin_of_the_readme_has_fifteen_lines() -> None:
    (block,) = [block for block in blocks(ROOT / "README.md") if block.argument("file")]
    assert len(block.text.splitlines()) <= 15


@pytest.mark.parametrize("page", [pytest.param("write-a-strategy", marks=pytest.mark.exhaustive), "write-a-plugin"])
def test_the_extensions_of_a_page_keep_the_contracts_that_it_gives_them(page: str, workplace: Path) -> None:
    path = ROOT / "docs" / "how-to" / f"{page}.md"
    install(path, workplace)
    code = [block.text for block in blocks(path) if block.language == "python" and block.argument("file") is None]
    (workplace / "test_page.py").write_text("\n\n".join(code), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_page.py"]
    run = subprocess.run(command, cwd=workplace, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
