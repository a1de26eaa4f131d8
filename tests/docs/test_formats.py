"""The page on formats. That its tables are what the code does today, tests/docs/test_generated.py checks."""

from __future__ import annotations

import pytest

from tests.docs.pages import ROOT, generator
from tests.docs.variants import TITLES
from tests.end_to_end.lora_variants import VARIANTS

PAGE = (ROOT / "docs/reference/formats.md").read_text(encoding="utf-8")
GENERATED = [block.partition("<!-- end -->")[0] for block in PAGE.split("<!-- generated: ")[1:]]
ROWS = {cells[0]: cells for line in "".join(GENERATED).splitlines() if len(cells := line.strip("| ").split(" | ")) > 1}


def test_every_title_is_that_of_a_variant() -> None:
    assert set(TITLES) - set(VARIANTS) == set()


@pytest.mark.parametrize("title", [title for title, _ in TITLES.values()])
def test_peft_computes_with_a_merged_variant_what_it_did_with_its_source(title: str) -> None:
    assert ROWS[title][2] == "same logits"


def test_every_format_and_writer_has_its_row() -> None:
    known = generator()["registry"]()
    assert {f"`{name}`" for name in (*known.formats, *known.writers)} - set(ROWS) == set()


def test_what_changes_its_base_is_refused() -> None:
    initialisations = [title for title in ROWS if title.startswith("`init_lora_weights")]
    assert len(initialisations) == 5
    assert {ROWS[title][1] for title in [*initialisations, "PEFT's other kinds"]} == {"refused"}
