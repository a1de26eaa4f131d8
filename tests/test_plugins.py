"""The plugins of this repository: distributions of their own, on the public API alone."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from mergekit_lowrank.hookspecs import ENTRY_POINT_GROUP
from tests.distributions import entry_points_in

PLUGINS = sorted(path.parent for path in (Path(__file__).parents[1] / "plugins").glob("*/pyproject.toml"))
FILES = sorted(path for plugin in PLUGINS for path in plugin.rglob("*.py"))
PUBLIC = {
    "mergekit_lowrank",
    *(
        f"mergekit_lowrank.{room}"
        for room in ("errors", "events", "executors", "formats", "lowrank", "spaces", "strategies", "strategies.stages")
    ),
    "mergekit_lowrank.testing",
}


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything taken from mergekit_lowrank."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mergekit_lowrank":
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "mergekit_lowrank"]
            found |= {(name, "__name__") for name in names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_plugin_imports_public_names_only(path: Path) -> None:
    for module, name in imported(path):
        assert module in PUBLIC, f"{module} is not for plugins"
        assert name == "__name__" or name in importlib.import_module(module).__all__, f"{module}.{name} is not public"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_a_plugin_is_registered_for_this_version_of_the_api(plugin: Path) -> None:
    groups = entry_points_in((plugin / "pyproject.toml").read_text(encoding="utf-8"))
    assert list(groups) == [ENTRY_POINT_GROUP]
    (module,) = groups[ENTRY_POINT_GROUP].values()
    assert (plugin / module / "__init__.py").is_file()


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_a_plugin_has_what_a_distribution_needs(plugin: Path) -> None:
    text = (plugin / "pyproject.toml").read_text(encoding="utf-8")
    assert f'name = "{plugin.name}"' in text
    assert '"mergekit-lowrank"' in text
    assert (plugin / "README.md").read_text(encoding="utf-8").startswith(f"# {plugin.name}\n")
    assert not (plugin / "tests" / "__init__.py").exists(), "it would hide this package of tests"


def test_tests_of_plugins_have_names_of_their_own() -> None:
    names = [path.name for path in FILES if re.fullmatch(r"test_\w+\.py", path.name)]
    assert sorted(set(names)) == sorted(names)
