"""The house has one-way dependencies: a room imports only from rooms above it."""

import ast
from pathlib import Path

import pytest

import mergekit_lowrank

PACKAGE = Path(mergekit_lowrank.__file__).parent
ROOMS = (
    "_version",
    "errors",
    "filenames",
    "pages",
    "lowrank",
    "spaces",
    "policies",
    "strategies",
    "formats",
    "events",
    "progress",
    "executors",
    "hookspecs",
    "registry",
    "servers",
    "recipe",
    "engine",
    "report",
    "requests",
    "verification",
    "runs",
    "api",
    "transforms",
    "diagnostics",
    "inspection",
    "evaluation",
    "testing",
    "cli",
)
PLUGIN_ROOMS = ("strategies", "spaces", "formats")
INTERNAL = ("registry", *ROOMS[ROOMS.index("recipe") :])
"""Rooms that a built-in may not use, as a plugin does not."""
HEAVY_EXTRAS = ("peft", "transformers")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def run_time_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in hidden and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import) and node not in hidden:
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_is_listed_once() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    own = ROOMS.index(room_of(path))
    for module in run_time_imports(path):
        parts = module.split(".")
        if parts[0] == "mergekit_lowrank" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= own, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_built_in_extensions_import_only_what_a_plugin_may(path: Path) -> None:
    if room_of(path) in PLUGIN_ROOMS:
        for module in run_time_imports(path):
            assert not module.startswith(tuple(f"mergekit_lowrank.{room}" for room in INTERNAL)), module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_never_imports_an_extra(path: Path) -> None:
    assert not {module.split(".")[0] for module in run_time_imports(path)} & set(HEAVY_EXTRAS)


def test_public_names_are_sorted_and_importable() -> None:
    assert mergekit_lowrank.__all__ == sorted(mergekit_lowrank.__all__)
    for name in mergekit_lowrank.__all__:
        assert getattr(mergekit_lowrank, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        mergekit_lowrank.mrege  # noqa: B018
