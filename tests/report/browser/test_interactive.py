"""Pages drawn by Plotly, and pages of comparisons and diagnoses, as people use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lowrank import Registry, merge
from mergekit_lowrank.diagnostics import diagnose
from mergekit_lowrank.diagnostics.page import diagnosis_page
from mergekit_lowrank.pages.interactive import interactive, with_plotly
from mergekit_lowrank.report.comparison import compare_merges
from mergekit_lowrank.report.comparison_page import comparison_page
from mergekit_lowrank.report.page import merge_page
from mergekit_lowrank.testing import write_tiny_adapter
from tests.report.reports import MODULES, record, report_of, written

from .conftest import Opens

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 900}
DRAWN = "#modules-merged-norm .plot .heatmaplayer image"


@pytest.fixture(scope="module")
def plots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a merge, drawn by Plotly; norms are 0, 1, …."""
    pytest.importorskip("plotly")
    root = tmp_path_factory.mktemp("plots")
    report = report_of([record(module, merged_norm=float(index)) for index, module in enumerate(MODULES)])
    path = root / "report.html"
    path.write_text(with_plotly(merge_page(written(root / "out", report), draw=interactive)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison and a diagnosis of tiny adapters."""
    root, registry = tmp_path_factory.mktemp("looks"), Registry()
    shapes = dict.fromkeys(MODULES, (12, 10))
    models = [{"model": str(write_tiny_adapter(root / name, shapes, seed=seed))} for seed, name in enumerate("ab")]
    for method in ("ties", "linear"):
        merge({"merge_method": method, "models": models}, root / method, registry=registry)
    compared = compare_merges(root / "ties", root / "linear", registry=registry)
    diagnosed = diagnose({"merge_method": "ties", "models": models}, registry=registry, executor="serial")
    pages = {"comparison": comparison_page(compared), "diagnosis": diagnosis_page(diagnosed)}
    for name, text in pages.items():
        (root / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: root / f"{name}.html" for name in pages}


def test_plots_are_drawn_when_they_are_seen_and_follow_the_page(opened: Opens, plots: Path) -> None:
    with opened(plots, viewport=DESK) as page:
        page.wait_for_selector("#overview .plot .ytick text")
        assert page.locator("#modules .plot .main-svg").count() == 0
        page.click("a[href='#modules']")
        page.wait_for_selector(DRAWN)
        box = page.locator(DRAWN).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
        assert page.locator("#modules-merged-norm .hoverlayer").text_content() == "self_attn.q_proj, layer 12"
        colour = "getComputedStyle(document.querySelector('#modules .plot .ytick text')).fill"
        light = page.evaluate(colour)
        page.click("#theme")
        page.wait_for_function(f"{colour} !== '{light}'")
        tools = page.eval_on_selector_all("#modules-merged-norm .modebar-btn", "all => all.map(a => a.dataset.title)")
        assert tools == ["Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]  # none that sends anything


def test_plots_fit_a_phone(opened: Opens, plots: Path) -> None:
    with opened(plots, viewport=PHONE, has_touch=True) as page:
        for tab in ("spectra",):
            page.click(f"a[href='#{tab}']")
            page.wait_for_selector(f"#{tab} .plot .main-svg")
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
            plot = "document.querySelector('#{} .plot{}').clientWidth"
            assert page.evaluate(plot.format(tab, " .main-svg")) == page.evaluate(plot.format(tab, ""))


@pytest.mark.parametrize("name", ["comparison", "diagnosis"])
def test_every_tab_shows_its_panel(opened: Opens, looks: dict[str, Path], name: str) -> None:
    with opened(looks[name], viewport=DESK) as page:
        tabs = [tab.removeprefix("#") for tab in page.eval_on_selector_all(".tabs a", "all => all.map(a => a.hash)")]
        for tab in tabs:
            page.click(f"a[href='#{tab}']")
            assert [own for own in tabs if page.locator(f"#{own}").is_visible()] == [tab]
        assert page.locator("main h2").count() >= len(tabs)


@pytest.mark.parametrize("name", ["comparison", "diagnosis"])
def test_a_phone_never_scrolls_sideways(opened: Opens, looks: dict[str, Path], name: str) -> None:
    with opened(looks[name], viewport=PHONE, has_touch=True) as page:
        for tab in page.eval_on_selector_all(".tabs a", "all => all.map(a => a.hash)"):
            page.click(f"a[href='{tab}']")
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_a_cell_of_a_comparison_tells_its_number(opened: Opens, looks: dict[str, Path]) -> None:
    def told(page: Any) -> str:
        page.hover("#distance rect[data-t] >> nth=0")
        return str(page.inner_text("#tip"))

    with opened(looks["comparison"], viewport=DESK) as page:
        page.click("a[href='#modules']")
        assert told(page).startswith("mlp.up_proj\nlayer 0: ")
        assert told(page).endswith("%")


def test_the_numbers_behind_a_finding_are_folded_away(opened: Opens, looks: dict[str, Path]) -> None:
    with opened(looks["diagnosis"], viewport=DESK) as page:
        first = page.locator(".finding").first
        assert first.locator("details p").first.is_hidden()
        first.locator("summary").click()
        assert first.locator("details p").first.is_visible()


def test_all_of_it_is_there_without_a_script(opened: Opens, looks: dict[str, Path]) -> None:
    for path in looks.values():
        with opened(path, java_script_enabled=False) as page:
            assert page.locator("section.panel:visible").count() == page.locator(".tabs a").count()
            assert page.locator("figure details table").count() == page.locator("figure").count() > 3
