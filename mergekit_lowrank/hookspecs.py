"""The hooks of a plugin: functions of these names, marked with ``hookimpl``, that return lists of classes.

Hooks run once, when a registry is loaded; they never sit in the tensor path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mergekit_lowrank.events import Reporter
    from mergekit_lowrank.executors import Executor
    from mergekit_lowrank.formats import Format, Writer
    from mergekit_lowrank.spaces import Space
    from mergekit_lowrank.strategies import Preset, Strategy

__all__ = ["API_VERSION", "ENTRY_POINT_GROUP", "PROJECT", "HookSpecs", "hookimpl", "hookspec"]

PROJECT = "mergekit_lowrank"
"""The name of the pluggy project, the same for every version of the API."""

API_VERSION = 1
"""Of what plugins are written against; a change that breaks a plugin raises it."""

ENTRY_POINT_GROUP = f"{PROJECT}.v{API_VERSION}"
"""Where installed plugins are looked for. The version is part of the name, so that it is known before an import."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """What a plugin may offer."""

    @hookspec
    def strategies(self) -> Sequence[type[Strategy] | Preset]:  # type: ignore[empty-body]
        """Merge methods, and presets of merge methods."""

    @hookspec
    def spaces(self) -> Sequence[type[Space]]:  # type: ignore[empty-body]
        """Spaces that strategies may work in."""

    @hookspec
    def formats(self) -> Sequence[type[Format]]:  # type: ignore[empty-body]
        """Readers of checkpoints. They are asked in the order of registration, plugins before the built-in ones."""

    @hookspec
    def writers(self) -> Sequence[type[Writer]]:  # type: ignore[empty-body]
        """Writers of adapters in other dialects, for ``output.format`` and ``convert``."""

    @hookspec
    def executors(self) -> Sequence[type[Executor]]:  # type: ignore[empty-body]
        """Ways to schedule the modules of a merge."""

    @hookspec
    def reporters(self) -> Sequence[type[Reporter]]:  # type: ignore[empty-body]
        """Consumers of merge events. One instance of each follows every merge."""
