"""The tutorial builds the plugin that this repository ships, and its commands print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lowrank.cli import main as program
from tests.distributions import Environment, entry_points_in, write_metadata
from tests.docs.pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial" / "first-plugin.md"
PLUGIN = ROOT / "plugins" / "mergekit-lowrank-median"
COMMANDS = [block for block in blocks(PAGE) if block.marker == "output with the plugin"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone's adapters, and the plugin as ``pip install`` leaves it."""
    Environment(tmp_path, monkeypatch)
    entries = entry_points_in((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    write_metadata(tmp_path, PLUGIN.name, "0.1.0", entries)
    monkeypatch.syspath_prepend(PLUGIN)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)


def test_the_files_of_the_tutorial_are_those_of_the_plugin() -> None:
    written = {block.argument("file"): block.text for block in blocks(PAGE) if block.argument("file")}
    shipped = {
        str(path.relative_to(PLUGIN.parent)): path.read_text(encoding="utf-8")
        for path in PLUGIN.rglob("*")
        if path.suffix in (".py", ".toml")
    }
    assert written == shipped


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_command_prints_what_the_tutorial_says(block: Block) -> None:
    command, _, expected = block.text.partition("\n")
    printed = CliRunner().invoke(program, shlex.split(command.removeprefix("$ mergekit-lowrank "))).output
    lines = [re.escape(line) for line in stable(expected).splitlines()]
    pattern = "\n".join("(?s:.+?)" if line.endswith("…") else line for line in lines)
    assert re.fullmatch(pattern, stable(printed)), printed


def stable(output: str) -> str:
    """Without seconds."""
    return re.sub(r"\bin \d+\.\d s\b", "in N s", output.rstrip())
