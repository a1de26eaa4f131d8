"""The page of a merge: whole for every report, safe, small, and without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank import merge
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.report.page import merge_page
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.testing import write_tiny_adapter

from .reports import MODULES, large_report, plain_report, record, report_of, written

LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{index}.{name}_proj" for index in range(128) for name in ("gate", "up", "down")]
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Outline(HTMLParser):
    """What a page is made of; complains about tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def values(self, name: str) -> list[str | None]:
        return [value for _, own, value in self.attributes if own == name]


def page_of(report: Report) -> str:
    with TemporaryDirectory() as directory:
        return merge_page(written(Path(directory), report))


def shares() -> st.SearchStrategy[float]:
    return st.floats(0, 1)


def sizes() -> st.SearchStrategy[float]:
    return st.floats(0, 1e30)


@st.composite
def records(draw: Any, module: str, labels: list[str]) -> dict[str, Any]:
    own = draw(st.lists(st.sampled_from(labels), unique=True, min_size=1))
    cosine = st.none() | st.floats(-1, 1)
    row = st.lists(cosine, min_size=len(own), max_size=len(own))
    spectrum = st.lists(sizes(), max_size=4).map(lambda values: sorted(values, reverse=True))
    return record(
        module,
        own,
        rank=draw(st.none() | st.integers(0, 64)),
        written_rank=draw(st.none() | st.integers(1, 64)),
        rank_for_99=draw(st.none() | st.integers(0, 64)),
        energy=draw(sizes()),
        kept_energy=draw(shares()),
        cut_error=draw(shares()),
        input_norms=draw(st.lists(sizes(), min_size=len(own), max_size=len(own))),
        merged_norm=draw(sizes()),
        scale=draw(st.floats(-1e6, 1e6)),
        retention=draw(st.none() | st.floats(-1e6, 1e6)),
        relative_error=draw(st.none() | sizes()),
        relative_error_is_estimate=draw(st.booleans()),
        cosines=draw(st.just([]) | st.lists(row, min_size=len(own), max_size=len(own))),
        sign_conflict=draw(st.none() | st.floats(0, 0.5)),
        sign_conflict_error=draw(shares()),
        spectrum=draw(spectrum),
        input_spectra=draw(st.lists(spectrum, min_size=len(own), max_size=len(own))),
        wall_seconds=draw(st.floats(0, 1e6)),
        warnings=draw(st.lists(st.text(max_size=8), max_size=1)),
    )


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
MODULE_NAMES = NAMES | st.builds("layers.{}.{}".format, st.integers(0, 3), NAMES)


@st.composite
def reports(draw: Any) -> Report:
    labels = draw(st.lists(NAMES, unique=True, min_size=1, max_size=3))
    modules = draw(st.lists(MODULE_NAMES, unique=True, max_size=4))
    return report_of(
        [draw(records(module, labels)) for module in modules],
        labels,
        kind=draw(st.sampled_from(["adapter", "model"])),
        server=draw(st.none() | st.sampled_from(["vllm", "sglang", "llama.cpp", "diffusers", "comfyui"])),
        rank=draw(st.none() | st.just(4)) if all(modules) else None,
        warnings=draw(st.lists(st.text(max_size=20), max_size=2)),
    )


def rank_is_true(report: Report) -> bool:
    return report.rank is None or any(module["written_rank"] is not None for module in report.modules)


@given(reports().filter(rank_is_true))
@settings(max_examples=25)
def test_every_report_has_a_whole_page(report: Report) -> None:
    outline = Outline(page_of(report))
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    ids = outline.values("id")
    assert len(ids) == len(set(ids))
    for label in (own.label for own in report.inputs):
        assert label in outline.text
    assert not any(word in value for value in outline.values("d") if value for word in ("nan", "inf"))


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'{{ 7*7 }}'"])
def test_names_are_text_and_nothing_else(word: str) -> None:
    report = report_of([record(f"layers.0.{word}", [word])], [word], warnings=[word], method=word)
    outline = Outline(page_of(report))
    assert outline.text.count(word) > 3
    assert {tag for tag, name, _ in outline.attributes if name.startswith("on") or tag == "img"} == set()


def test_nothing_comes_from_elsewhere() -> None:
    page = page_of(plain_report())
    outline = Outline(page)
    assert outline.values("src") == []
    assert all(str(link).startswith("#") for link in outline.values("href"))
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!\"#)", page)


@pytest.mark.parametrize(("layers", "kinds", "inputs"), [(80, LLAMA, 8), (3, EXPERTS, 2)])
def test_the_page_of_a_large_model_is_below_two_megabytes(layers: int, kinds: list[str], inputs: int) -> None:
    assert len(page_of(large_report(layers, kinds, inputs)).encode()) < 2_000_000


def test_warnings_come_before_numbers() -> None:
    text = Outline(page_of(plain_report(warnings=["mind the gap"]))).text
    assert text.index("1 warning") < text.index("mind the gap") < text.index("Merged norm")


def test_warnings_of_all_modules_are_listed() -> None:
    told = [record(module, warnings=[f"{module} is odd"]) for module in MODULES]
    text = Outline(page_of(report_of(told))).text
    assert all(f"{module} is odd" in text for module in MODULES)


def test_a_map_of_one_number_is_a_line() -> None:
    text = Outline(page_of(plain_report())).text
    assert re.search(r"The same in every module.*Written rank\s*4\b", text, re.DOTALL)


def test_recipe_hashes_and_commands_can_be_read() -> None:
    text = Outline(page_of(plain_report())).text
    assert "merge_method: ties\n" in text
    assert "f" * 64 in text
    assert "each of its 1 tensors in manifest.json" in text
    assert "PeftModel.from_pretrained(base_model, 'PATH')" in text
    assert "--max-lora-rank 8" in text


def test_energy_that_was_cut_never_reads_as_whole() -> None:
    totals = plain_report().totals.model_copy(update={"kept_energy": 1 - 1e-9})
    assert "99.99 %" in Outline(page_of(plain_report(totals=totals))).text


def test_what_was_not_decomposed_is_said() -> None:
    totals = plain_report().totals.model_copy(update={"rank_for_99": None})
    assert re.search(
        r"Rank for 99 %\s*higher\s*than was decomposed", Outline(page_of(plain_report(totals=totals))).text
    )
    whole = Outline(page_of(plain_report(totals=totals, kind="model", rank=None))).text
    assert "updates added whole" in whole
    assert "Rank for 99 %" not in whole


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    (written(tmp_path / "out", plain_report()) / "recipe.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"recipe.yaml: cannot be read: .*Expected the recipe that a merge writes"
    ):
        merge_page(tmp_path / "out")


def adapters(root: Path) -> Iterator[dict[str, str]]:
    shapes = {f"model.layers.{layer}.q_proj": (6, 5) for layer in range(2)} | {"lm_head": (7, 6)}
    yield {"model": str(write_tiny_adapter(root / "a", shapes, rank=2, seed=1))}
    del shapes["lm_head"]
    yield {"model": str(write_tiny_adapter(root / "b", shapes, rank=3, seed=2))}


def test_a_merge_writes_its_page_last(tmp_path: Path) -> None:
    merge({"merge_method": "ties", "models": list(adapters(tmp_path))}, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page == merge_page(tmp_path / "out")
    assert "2 adapters merged with" in page
    assert "report.html" not in (tmp_path / "out" / "manifest.json").read_text()


def test_each_variant_of_a_sweep_has_a_page_and_can_be_replaced(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": list(adapters(tmp_path)), "sweep": {"scale": [1.0, 0.5]}}
    for _ in range(2):
        merge(recipe, tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").glob("*/report.html"))) == 2


def test_servers_are_called_as_people_write_them() -> None:
    assert "loads in vLLM." in Outline(page_of(plain_report())).text
    assert "loads in llama.cpp." in Outline(page_of(plain_report(server="llama.cpp"))).text


def test_the_mean_cosine_has_three_decimals() -> None:
    cosines = [[1.0, 0.00317], [0.00317, 1.0]]
    text = Outline(page_of(report_of([record("layers.0.q", cosines=cosines)]))).text
    assert re.search(r"Mean cosine\s*0\.003\s", text)
