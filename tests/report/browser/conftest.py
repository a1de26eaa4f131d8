"""Pages in a real browser, where there is one: Chromium or Chrome, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--no-sandbox",  # containers have none; the pages are our own
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Opens(Protocol):
    def __call__(self, path: Path, **context: Any) -> AbstractContextManager[Any]:
        """A page of a file. What it logs, and what it asks the network for, must be nothing."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are driven by playwright")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=executable, args=[*QUIET])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def opened(browser: Any) -> Opens:
    """Opens a file, and tells of all that went wrong on its page."""

    @contextmanager
    def open_page(path: Path, **context: Any) -> Iterator[Any]:
        faults: list[str] = []
        own = browser.new_context(**context)
        page = own.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url == path.as_uri() or faults.append(request.url))
        page.goto(path.as_uri())
        yield page
        own.close()
        assert faults == []

    return open_page
