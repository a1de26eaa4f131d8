"""The notebook of the docs, executed: ``python -m tests.docs.notebook`` stores the outputs anew where they differ.

It needs nbclient and ipykernel, and works in a directory that holds ``recipes`` like a clone does.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial" / "notebook.ipynb"
SECONDS = 300
"""That one cell may take on a busy machine."""
VARYING = re.compile(r"\b\d+\.\d s\b")
"""What differs from run to run: seconds."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def executed(directory: Path) -> Any:
    """The notebook with the outputs of a kernel of its own.

    Args:
        directory: an empty one to work in.
    """
    import nbformat
    from nbclient import NotebookClient

    (directory / "recipes").symlink_to(ROOT / "recipes")
    place = directory / NOTEBOOK.parent.relative_to(ROOT)
    place.mkdir(parents=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(place)}},
    )
    return client.execute(env=os.environ | environment(directory))


def environment(directory: Path) -> dict[str, str]:
    """What the kernel is told: no installed plugins, no network, and nothing of the user's own settings."""
    own = {name: str(directory / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**own, "MERGEKIT_LOWRANK_DISABLE_PLUGINS": "all", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


def shown(notebook: Any) -> Iterator[tuple[str, str]]:
    """The source of each cell with what it shows: printed text and results, as text or HTML."""
    for cell in notebook.cells:
        outputs = [] if cell.cell_type != "code" else cell.outputs
        yield cell.source, "\n".join(_text(output) for output in outputs if output.get("name") != "stderr")


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    data = output.get("data", {})
    return str(data.get("text/html", data.get("text/plain", output.get("evalue", ""))))


def parts(text: str) -> tuple[list[str], list[float]]:
    """A text without what varies: its words, and its numbers, which other machines round otherwise."""
    still = VARYING.sub("", text)
    return NUMBER.split(still), [float(number) for number in NUMBER.findall(still)]


def main() -> None:
    """Store the outputs, unless they are those that are stored."""
    import nbformat

    before = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        notebook = executed(Path(directory))
    if [parts(text) for _, text in shown(notebook)] == [parts(text) for _, text in shown(before)]:
        return
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                output.data.pop("text/plain")  # the same at length, with the paths of this machine
    notebook.metadata.pop("language_info", None)  # the version of Python
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(NOTEBOOK.relative_to(ROOT), "rewritten")  # noqa: T201


if __name__ == "__main__":
    main()
