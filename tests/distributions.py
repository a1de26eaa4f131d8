"""Distributions as ``pip install`` leaves them: modules beside a ``.dist-info`` with entry points."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoints, distributions
from pathlib import Path

import pytest

from mergekit_lowrank import registry
from mergekit_lowrank.hookspecs import ENTRY_POINT_GROUP

MEDIAN = '''
from mergekit_lowrank import ElementwiseStrategy, hookimpl


class Median(ElementwiseStrategy):
    """Coordinate-wise median."""

    name = "median"
    summary = "the coordinate-wise median"

    def merge_block(self, block, weights, context):
        return block.median(dim=0).values


@hookimpl
def strategies():
    return [Median]
'''


class Environment:
    """A directory of which all distributions are installed, and no others."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory, self._monkeypatch = directory, monkeypatch
        monkeypatch.syspath_prepend(directory)
        monkeypatch.setattr(registry, "entry_points", self._entry_points)
        monkeypatch.delenv(registry.DISABLE_VARIABLE, raising=False)

    def _entry_points(self) -> EntryPoints:
        found = distributions(path=[str(self._directory)])
        return EntryPoints(entry for distribution in found for entry in distribution.entry_points)

    def install(
        self,
        name: str,
        source: str,
        *,
        version: str = "1.2",
        group: str = ENTRY_POINT_GROUP,
        plugin: str | None = None,
    ) -> None:
        """A distribution with one module, which its only entry point names.

        Args:
            name: of the distribution; the module has it too, with underscores.
            source: of the module.
            version: of the distribution.
            group: of the entry point.
            plugin: name of the entry point; the distribution's by default.
        """
        module = name.replace("-", "_")
        (self._directory / f"{module}.py").write_text(source, encoding="utf-8")
        self._monkeypatch.setitem(sys.modules, module, None)  # so that it is forgotten after the test
        del sys.modules[module]
        write_metadata(self._directory, name, version, {group: {plugin or name: module}})


def write_metadata(directory: Path, name: str, version: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """The ``.dist-info`` of a distribution."""
    metadata = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def entry_points_in(pyproject: str) -> dict[str, dict[str, str]]:
    """The entry points of a ``pyproject.toml``, by group."""
    tables = re.findall(r'^\[project\.entry-points\."([^"]+)"\]\n((?:.+\n?)*)', pyproject, re.MULTILINE)
    return {group: dict(re.findall(r'^(\S+) = "(.+)"$', lines, re.MULTILINE)) for group, lines in tables}
