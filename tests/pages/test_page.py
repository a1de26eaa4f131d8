"""Templates: escaped, strict, whole."""

from __future__ import annotations

import pytest
from jinja2 import TemplateNotFound, UndefinedError

from mergekit_lowrank.pages import render


def test_the_base_is_a_page_by_itself() -> None:
    page = render("base.html")
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="is undefined"):
        render("merge.html")


def test_a_template_that_is_missing_is_an_error() -> None:
    with pytest.raises(TemplateNotFound):
        render("none.html")
