from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, generator

GENERATED = [
    page for page in PAGES if "<!-- generated:" in page.read_text() or "<!-- checked output" in page.read_text()
]


@pytest.fixture(scope="module")
def rewritten() -> object:
    return generator()["rewritten"]


def test_every_method_of_this_repository_has_a_page() -> None:
    made = generator()
    assert set(made["registry"]().methods) - set(made["pages_of_methods"]()) == set(), "name it in the title of a page"


def test_the_plugins_of_this_repository_are_read_from_their_sources() -> None:
    names = {record.distribution for record in generator()["registry"]().plugins}
    assert names == {"mergekit-lowrank", *(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))}


def cases() -> list[object]:
    """Pages by name. That of the formats tries every variant, which end_to_end/ does too."""
    slow = {ROOT / "docs/reference/formats.md": pytest.mark.exhaustive}
    return [pytest.param(page, marks=slow.get(page, ()), id=str(page.relative_to(ROOT))) for page in GENERATED]


@pytest.mark.parametrize("page", cases())
def test_a_page_is_up_to_date(page: Path, rewritten: object) -> None:
    assert callable(rewritten)
    assert rewritten(page) == page.read_text(encoding="utf-8"), "run: python docs/generate.py"
