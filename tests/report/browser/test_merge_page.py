"""The page of a merge, as people use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lowrank.report.page import merge_page
from tests.report.reports import MODULES, large_report, record, report_of, written

from .conftest import Opens

TABS = ["overview", "modules", "inputs", "spectra", "costs", "recipe", "load"]
PHONE = {"width": 360, "height": 740}
MAP = "#modules-merged-norm svg.cells"


def saved(directory: Path, report: Any) -> Path:
    path = directory / "report.html"
    path.write_text(merge_page(written(directory / "out", report)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six modules, one of them in no layer, whose norms are 0, 1, …."""
    names = [*MODULES[:-1], "lm_head"]
    records = [record(module, merged_norm=float(index)) for index, module in enumerate(names)]
    return saved(tmp_path_factory.mktemp("small"), report_of(records, warnings=["look here"]))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["self_attn.q_proj", "mlp.a_very_long_name_of_a_projection_that_nobody_would_give"]
    return saved(tmp_path_factory.mktemp("large"), large_report(80, kinds, 12))


def visible(page: Any) -> list[str]:
    return [tab for tab in TABS if page.locator(f"#{tab}").is_visible()]


def test_tabs_are_chosen_by_a_click_and_by_an_address(opened: Opens, small: Path) -> None:
    with opened(small) as page:
        assert visible(page) == ["overview"]
        for tab in TABS:
            page.click(f"a[href='#{tab}']")
            assert visible(page) == [tab]
        page.evaluate("location.hash = 'modules-merged-norm'")
        page.wait_for_selector(MAP, state="visible")
        assert visible(page) == ["modules"]


def test_tabs_are_chosen_by_the_keyboard(opened: Opens, small: Path) -> None:
    with opened(small) as page:
        page.focus("[role=tab][aria-selected=true]")
        for key, shown in [
            ("ArrowRight", "modules"),
            ("End", "load"),
            ("ArrowRight", "overview"),
            ("Home", "overview"),
        ]:
            page.keyboard.press(key)
            assert visible(page) == [shown]
            assert page.evaluate("document.activeElement.getAttribute('aria-controls')") == shown
        assert page.locator("[role=tab][tabindex='0']").count() == 1


def test_a_cell_tells_its_number_under_the_pointer(opened: Opens, small: Path) -> None:
    with opened(small, viewport={"width": 1200, "height": 900}) as page:
        page.click("a[href='#modules']")
        page.locator(f"{MAP} g[data-row='mlp.up_proj'] rect[data-t]").first.hover()
        assert page.inner_text("#tip") == "mlp.up_proj\nlayer 0: 1"
        page.hover(f"{MAP} g[data-row=lm_head] rect[data-t]")
        assert page.inner_text("#tip") == "lm_head\n5"
        page.hover("h1")
        assert page.locator("#tip").is_hidden()


def test_a_cell_tells_its_number_to_the_keyboard(opened: Opens, small: Path) -> None:
    with opened(small, viewport={"width": 1200, "height": 900}) as page:
        page.click("a[href='#modules']")
        page.locator("#modules").focus()
        page.keyboard.press("Tab")
        told = []
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)
            page.wait_for_timeout(30)
            told.append(page.inner_text("#tip"))
        assert told[0] == "self_attn.q_proj\nlayer 1: 2"
        assert told[1:] == ["mlp.up_proj\nlayer 1: 3", "mlp.up_proj\nlayer 0: 1", "mlp.up_proj\nlayer 0: 1"]
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()


def test_a_spectrum_tells_its_numbers(opened: Opens, small: Path) -> None:
    with opened(small, viewport={"width": 1200, "height": 900}) as page:
        page.click("a[href='#spectra']")
        page.locator("svg.lines").first.hover()
        assert page.inner_text("#tip") == "direction 2\nmath: 0.5\ncode: 0.5\nmerged, before the cut: 0.5"
        page.locator("#spectra").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert "direction 3" in page.inner_text("#tip")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_until_the_button_is_pressed(opened: Opens, small: Path, scheme: str) -> None:
    def is_dark(page: Any) -> bool:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128

    with opened(small, color_scheme=scheme) as page:
        assert is_dark(page) == (scheme == "dark")
        page.click("#theme")
        assert is_dark(page) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(opened: Opens, small: Path, scheme: str) -> None:
    with opened(small, color_scheme=scheme, viewport={"width": 1200, "height": 900}) as page:
        for tab in TABS:
            page.click(f"a[href='#{tab}']")
            assert [found for found in page.evaluate(CONTRASTS) if found[0] < 4.5] == []


def test_a_phone_never_scrolls_sideways(opened: Opens, small: Path, large: Path) -> None:
    for path in (small, large):
        with opened(path, viewport=PHONE, has_touch=True) as page:
            for tab in TABS:
                page.click(f"a[href='#{tab}']")
                assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
            page.click("a[href='#modules']")
            if path == large:
                assert page.evaluate(f"document.querySelector('{MAP}').parentNode.scrollWidth") > PHONE["width"]


def test_everything_is_there_without_a_script(opened: Opens, small: Path) -> None:
    with opened(small, java_script_enabled=False) as page:
        assert visible(page) == TABS
        assert page.locator("figure").count() == page.locator("figure details table").count() > 8
        assert page.locator("#theme").is_hidden()
        assert page.locator("#tip").is_hidden()


def test_a_copy_button_copies_or_selects(opened: Opens, small: Path) -> None:
    with opened(small, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.click("a[href='#recipe']")
        page.click("#recipe .code button")
        page.wait_for_function("document.querySelector('#recipe .code button').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()") == "merge_method: ties\n"


def test_all_parts_are_printed_in_light_colours(opened: Opens, small: Path) -> None:
    with opened(small, color_scheme="dark", viewport={"width": 794, "height": 1123}) as page:
        page.emulate_media(media="print")
        assert visible(page) == TABS
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("document.documentElement.scrollWidth") == 794
        assert page.locator("nav.tabs").is_hidden()


# Of all texts that can be seen, (contrast by WCAG 2.2, the text); texts over a drawing are left to its own tests.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb(colour).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const own = getComputedStyle(node).backgroundColor;
      if (rgb(own)[3] === 255) return own;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const node = walker.currentNode.parentElement;
    if (!text || !node.checkVisibility() || node.closest("script, style, g[data-row]")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(ground(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text]);
  }
  return found;
}"""
