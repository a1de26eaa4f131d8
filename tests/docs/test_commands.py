from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from mergekit_lowrank.cli import main as program
from tests.docs.pages import PAGES, ROOT, blocks

LANGUAGES = ("console", "bash")


def commands(page: Path) -> list[str]:
    found = []
    for block in blocks(page):
        if block.language in LANGUAGES:
            lines = block.text.replace("\\\n", " ").splitlines()
            typed = [line[2:] for line in lines if line.startswith("$ ")] if block.language == "console" else lines
            found += [part.strip() for line in typed for part in line.split("&&")]
    return [command for command in found if command.startswith("mergekit-lowrank ")]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p.relative_to(ROOT)}: {c}" for p, c in COMMANDS])
def test_a_command_is_understood(page: Path, command: str, workplace: Path) -> None:
    _, name, *arguments = shlex.split(command)
    group = click.Context(program, info_name="mergekit-lowrank", **program.context_settings)
    found = program.get_command(group, name)
    assert found is not None, f"there is no command {name}"
    found.make_context(name, arguments, parent=group)


def test_the_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert (
        "python -m venv .venv && . .venv/bin/activate && pip install . && "
        "mergekit-lowrank merge recipes/quickstart.yaml out/"
    ) in lines
    assert "pip install '.[test]' && pytest -n auto" in lines


def test_every_command_has_its_section() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text()
    assert [name for name in program.commands if f"\n## {name}\n" not in text] == []
