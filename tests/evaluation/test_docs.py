from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lowrank.evaluation import Find, Task, Tasks, load_tasks
from mergekit_lowrank.recipe.document import read_yaml
from tests.docs.pages import ROOT, Block, blocks

REFERENCE = ROOT / "docs" / "reference" / "tasks.md"
HOW_TO = ROOT / "docs" / "how-to" / "evaluate.md"
BLOCKS = [block for page in (REFERENCE, HOW_TO) for block in blocks(page) if block.language == "yml"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_tasks_file_in_the_docs_is_valid(block: Block) -> None:
    data = read_yaml(block.text, locate=lambda line, column: f"{line + 1}:{column + 1}").data
    assert isinstance(data, dict)
    assert load_tasks(data).tasks


@pytest.mark.parametrize("key", [key for model in (Tasks, Task, Find) for key in model.model_fields])
def test_every_key_is_in_the_reference(key: str) -> None:
    assert f"| `{key}` | " in REFERENCE.read_text(encoding="utf-8")


def test_the_bundled_tasks_are_all_there() -> None:
    directory = ROOT / "tests" / "benchmarks" / "accuracy"
    tasks = load_tasks(directory / "tasks.yaml").tasks
    experts = {task.expert for task in tasks.values() if task.expert}
    assert experts == {path.name for path in (ROOT / "recipes" / "adapters").iterdir() if path.is_dir()}
    assert len(tasks) == 8
    assert all(
        Path(directory / f"{task.python.partition(':')[0]}.py").is_file() for task in tasks.values() if task.python
    )
