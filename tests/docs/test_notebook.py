"""The notebook runs in a kernel and shows what is stored in it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.docs.notebook import NOTEBOOK, executed, parts, shown

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = [
    pytest.mark.slow,
    # Sockets and event loops of Jupyter's client, from version to version.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return executed(tmp_path_factory.mktemp("notebook"))


def test_the_notebook_is_valid_and_was_run_from_top_to_bottom(stored: Any) -> None:
    nbformat.validate(stored)
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_the_notebook_shows_what_it_shows_when_it_is_run(stored: Any, made: Any) -> None:
    for (source, expected), (_, found) in zip(shown(stored), shown(made), strict=True):
        (words, numbers), (found_words, found_numbers) = parts(expected), parts(found)
        assert found_words == words, source
        assert found_numbers == pytest.approx(numbers, rel=0.02, abs=0.011), source


def test_a_progress_bar_vanishes_and_no_warning_is_left(made: Any) -> None:
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    (bar,) = [output.text for output in outputs if output.get("name") == "stderr"]
    assert bar.endswith("\r")
    assert bar.strip() == ""
