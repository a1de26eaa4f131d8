"""What is there to merge with: strategies, spaces, formats, executors and reporters, built in or from plugins."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from mergekit_lowrank._version import __version__
from mergekit_lowrank.errors import PluginError, RecipeError, nearest_name
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.executors import Executor, SerialExecutor, ThreadExecutor
from mergekit_lowrank.formats import Format, PeftFormat
from mergekit_lowrank.hookspecs import ENTRY_POINT_GROUP, HookSpecs, hookimpl
from mergekit_lowrank.spaces import CoreSpace, DeltaSpace, FactorSpace, JointSpace, Space
from mergekit_lowrank.strategies import (
    BUILT_IN_PRESETS,
    Drm,
    ElementwiseStrategy,
    Linear,
    Preset,
    RobustMerge,
    Strategy,
    Ties,
)

__all__ = ["DISABLE_VARIABLE", "PluginRecord", "Registry"]

DISABLE_VARIABLE = "MERGEKIT_LOWRANK_DISABLE_PLUGINS"
"""Environment variable: names of plugins not to load, separated by commas, or ``all``."""

BUILT_IN = "mergekit-lowrank"
HOOKS = ("strategies", "spaces", "formats", "executors", "reporters")
RESERVED_PARAMETERS = frozenset({"weight"})

Kind = TypeVar("Kind")


class BuiltIns:
    """The built-in extensions, offered through the same hooks as a plugin's."""

    @hookimpl
    def strategies(self) -> Sequence[type[Strategy] | Preset]:
        """RobustMerge, DRM, TIES, linear, and their presets."""
        return [RobustMerge, Drm, Ties, Linear, *BUILT_IN_PRESETS]

    @hookimpl
    def spaces(self) -> Sequence[type[Space]]:
        """The four spaces."""
        return [FactorSpace, DeltaSpace, JointSpace, CoreSpace]

    @hookimpl
    def formats(self) -> Sequence[type[Format]]:
        """PEFT adapters."""
        return [PeftFormat]

    @hookimpl
    def executors(self) -> Sequence[type[Executor]]:
        """In this process."""
        return [ThreadExecutor, SerialExecutor]


@dataclass(frozen=True)
class PluginRecord:
    """One plugin as ``mergekit-lowrank plugins`` shows it.

    Attributes:
        name: of its entry point.
        distribution: the installed package, or empty for one registered by hand.
        version: of the distribution.
        registers: names by hook.
        error: why it was not loaded; None when it was.
    """

    name: str
    distribution: str
    version: str
    registers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None


class Registry:
    """Typed look-ups over what plugins registered. An instance holds the built-ins; ``load`` adds installed plugins.

    Attributes:
        methods: strategies and presets by name; a strategy appears as a preset that fixes nothing.
        spaces: by name.
        formats: in the order in which they are asked, plugins first.
        executors: by name.
        reporters: by name.
        plugins: what was loaded, and what failed to load.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
        self._manager.add_hookspecs(HookSpecs)
        self._owners: dict[tuple[str, str], str] = {}
        self.methods: dict[str, Preset] = {}
        self.spaces: dict[str, type[Space]] = {}
        self.formats: dict[str, type[Format]] = {}
        self.executors: dict[str, type[Executor]] = {}
        self.reporters: dict[str, type[Reporter]] = {}
        self.plugins: list[PluginRecord] = []
        self.register(BuiltIns(), BUILT_IN, distribution=BUILT_IN, version=__version__)

    @classmethod
    def load(cls, *, disabled: Iterable[str] | None = None) -> Registry:
        """The built-ins and every installed plugin that is not disabled.

        A plugin that fails to import, or is refused, is recorded with its cause and does not take the rest down.

        Args:
            disabled: names of entry points, or ``all``; by default what ``MERGEKIT_LOWRANK_DISABLE_PLUGINS`` says.
        """
        registry = cls()
        given = os.environ.get(DISABLE_VARIABLE, "").split(",") if disabled is None else disabled
        names = {name.strip() for name in given}
        for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
            if not names & {entry.name, "all"}:
                registry._load_entry(entry)
        return registry

    def _load_entry(self, entry: EntryPoint) -> None:
        distribution = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
        try:
            self.register(entry.load(), entry.name, distribution=distribution[0], version=distribution[1])
        except PluginError as error:
            self.plugins.append(PluginRecord(entry.name, *distribution, error=str(error)))
        except Exception as error:
            cause = f"importing {entry.value} failed: {type(error).__name__}: {error}"
            self.plugins.append(PluginRecord(entry.name, *distribution, error=cause))

    def register(self, plugin: object, name: str, *, distribution: str = "", version: str = "") -> None:
        """Add what the hooks of ``plugin`` (a module, class instance or namespace) offer; all of it, or nothing.

        Raises:
            PluginError: a misspelt hook, something that is not an extension, or a name that is taken.
        """
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            offers = {hook: self._offered(plugin, hook) for hook in HOOKS}
            self._check(name, offers)
        except PluginError:
            self._forget(plugin)
            raise
        except Exception as error:
            self._forget(plugin)
            raise PluginError(_hook_problem(name, plugin, error)) from error
        if not any(offers.values()):
            self._forget(plugin)
            raise PluginError(f"plugin '{name}' registers nothing: mark its hooks ({', '.join(HOOKS)}) with hookimpl")
        self._add(name, offers)
        registers = {hook: tuple(item.name for item in items) for hook, items in offers.items() if items}
        self.plugins.append(PluginRecord(name, distribution, version, registers))

    def _forget(self, plugin: object) -> None:
        if self._manager.is_registered(plugin):
            self._manager.unregister(plugin)

    def _offered(self, plugin: object, hook: str) -> list[Any]:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        results = self._manager.subset_hook_caller(hook, others)()
        for result in results:
            if not isinstance(result, list | tuple):
                raise PluginError(f"hook '{hook}' returned {result!r}; expected a list")
        return [item for result in results for item in result]

    def _check(self, plugin: str, offers: Mapping[str, Sequence[Any]]) -> None:
        kinds: dict[str, type] = {"spaces": Space, "formats": Format, "executors": Executor, "reporters": Reporter}
        seen = dict(self._owners)
        for hook, items in offers.items():
            for item in items:
                _check_extension(plugin, hook, item, kinds.get(hook, Strategy))
                owner = seen.setdefault((hook, item.name), plugin)
                if owner != plugin or [other.name for other in items].count(item.name) > 1:
                    raise PluginError(
                        f"{hook}: the name '{item.name}' is registered by both '{owner}' and '{plugin}'; "
                        f"rename one of them, or disable a plugin with {DISABLE_VARIABLE}={plugin}"
                    )

    def _add(self, plugin: str, offers: Mapping[str, Sequence[Any]]) -> None:
        for item in offers["strategies"]:
            preset = item if isinstance(item, Preset) else Preset(item.name, item, item.summary, item.paper)
            self.methods[preset.name] = preset
        self.spaces |= {item.name: item for item in offers["spaces"]}
        self.formats = {item.name: item for item in offers["formats"]} | self.formats
        self.executors |= {item.name: item for item in offers["executors"]}
        self.reporters |= {item.name: item for item in offers["reporters"]}
        self._owners |= {(hook, item.name): plugin for hook, items in offers.items() for item in items}

    def owner(self, hook: str, name: str) -> str:
        """The plugin that registered ``name``."""
        return self._owners[hook, name]

    def method(self, name: str) -> Preset:
        """The strategy or preset of this name.

        Raises:
            RecipeError: there is none; the nearest name and failed plugins are named.
        """
        return _look_up(self.methods, name, "merge_method", self._failed())

    def space(self, name: str) -> type[Space]:
        """The space of this name, or RecipeError."""
        return _look_up(self.spaces, name, "space", self._failed())

    def spaces_of(self, method: Preset) -> tuple[str, ...]:
        """The spaces in which a method may be used, its default first."""
        if method.space is not None:
            return (method.space,)
        others = (name for name in self.spaces if name not in method.strategy.spaces)
        return (*method.strategy.spaces, *(name for name in others if method.strategy.supports(name)))

    def executor(self, name: str) -> type[Executor]:
        """The executor of this name, or RecipeError."""
        return _look_up(self.executors, name, "executor", self._failed())

    def _failed(self) -> Iterator[PluginRecord]:
        return (record for record in self.plugins if record.error)


def _look_up(known: Mapping[str, Kind], name: str, what: str, failed: Iterator[PluginRecord]) -> Kind:
    if name in known:
        return known[name]
    nearest = nearest_name(name, known)
    hint = f"; did you mean '{nearest}'?" if nearest else "."
    broken = ", ".join(f"'{record.name}'" for record in failed)
    plugins = f" (plugins that failed to load: {broken}; see `mergekit-lowrank plugins`)" if broken else ""
    raise RecipeError(f"unknown {what} '{name}'{hint}{plugins} Known: {', '.join(sorted(known))}.")


def _check_extension(plugin: str, hook: str, item: Any, kind: type) -> None:
    is_preset = hook == "strategies" and isinstance(item, Preset)
    if not is_preset and not (isinstance(item, type) and issubclass(item, kind)):
        raise PluginError(f"plugin '{plugin}': hook '{hook}' returned {item!r}; expected subclasses of {kind.__name__}")
    cls = item.strategy if is_preset else item
    missing = [name for name in ("name", "summary") if not isinstance(getattr(item, name, None), str)]
    if issubclass(cls, Strategy) and not getattr(cls, "spaces", ()):
        missing.append("spaces")
    if missing:
        raise PluginError(f"plugin '{plugin}': {item!r} lacks {', '.join(missing)}")
    if issubclass(cls, ElementwiseStrategy) and not _overrides(cls, ("merge_block", "merge_part", "merge")):
        raise PluginError(f"plugin '{plugin}': {item!r} implements none of merge_block, merge_part and merge")
    params = getattr(cls, "Params", BaseModel)
    taken = RESERVED_PARAMETERS & set(params.model_fields)
    if taken:
        raise PluginError(
            f"plugin '{plugin}': '{item.name}' has a parameter called {', '.join(taken)}, a reserved name"
        )


def _overrides(cls: type[ElementwiseStrategy], names: Sequence[str]) -> bool:
    return any(getattr(cls, name) is not getattr(ElementwiseStrategy, name) for name in names)


def _hook_problem(name: str, plugin: object, error: Exception) -> str:
    misspelt = [
        attribute
        for attribute in dir(plugin)
        if hasattr(getattr(plugin, attribute, None), f"{ENTRY_POINT_GROUP}_impl") and attribute not in HOOKS
    ]
    if not misspelt:
        return f"plugin '{name}': {error}"
    nearest = nearest_name(misspelt[0], HOOKS)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return f"plugin '{name}': there is no hook '{misspelt[0]}'{hint} Hooks: {', '.join(HOOKS)}."
