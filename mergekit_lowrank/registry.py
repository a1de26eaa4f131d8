"""What is there to merge with: strategies, spaces, formats, executors and reporters, built in or from plugins."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from mergekit_lowrank._version import __version__
from mergekit_lowrank.errors import PluginError, RecipeError, nearest_name
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.executors import Executor, ProcessExecutor, SerialExecutor, ThreadExecutor
from mergekit_lowrank.formats import Format, GgufWriter, PeftFormat, PeftWriter, WholeModelFormat, Writer
from mergekit_lowrank.hookspecs import API_VERSION, ENTRY_POINT_GROUP, PROJECT, HookSpecs, hookimpl
from mergekit_lowrank.spaces import CoreSpace, DeltaSpace, FactorSpace, JointSpace, Space, SpaceParams, TuckerSpace
from mergekit_lowrank.strategies import (
    BUILT_IN_METHODS,
    ElementwiseStrategy,
    Params,
    Preset,
    Strategy,
)

__all__ = ["DISABLE_VARIABLE", "PluginRecord", "Registry"]

DISABLE_VARIABLE = "MERGEKIT_LOWRANK_DISABLE_PLUGINS"
"""Environment variable: names of plugins or distributions not to load, separated by commas, or ``all``."""

ALL = "all"
BUILT_IN = "mergekit-lowrank"
HOOKS = ("strategies", "spaces", "formats", "writers", "executors", "reporters")
RESERVED_PARAMETERS = frozenset({"weight"})
ANY_GROUP = re.compile(rf"{PROJECT}(?:\.v(?P<api>\d+))?")
"""Entry-point groups of plugins for any version of the API, and the one that names none."""

Kind = TypeVar("Kind")


class BuiltIns:
    """The built-in extensions, offered through the same hooks as a plugin's."""

    @hookimpl
    def strategies(self) -> Sequence[type[Strategy] | Preset]:
        """Every merge method of this package."""
        return BUILT_IN_METHODS

    @hookimpl
    def spaces(self) -> Sequence[type[Space]]:
        """Every space of this package."""
        return [FactorSpace, DeltaSpace, JointSpace, CoreSpace, TuckerSpace]

    @hookimpl
    def formats(self) -> Sequence[type[Format]]:
        """PEFT adapters, and full fine-tunes."""
        return [PeftFormat, WholeModelFormat]

    @hookimpl
    def writers(self) -> Sequence[type[Writer]]:
        """PEFT's own layout."""
        return [PeftWriter, GgufWriter]

    @hookimpl
    def executors(self) -> Sequence[type[Executor]]:
        """On this machine."""
        return [ThreadExecutor, SerialExecutor, ProcessExecutor]


@dataclass(frozen=True)
class PluginRecord:
    """One plugin as ``mergekit-lowrank plugins`` shows it.

    Attributes:
        name: of its entry point.
        distribution: the installed package, or empty for one registered by hand.
        version: of the distribution.
        registers: names by hook.
        error: why it could not be loaded; None when it was, or was not tried.
        is_disabled: whether it was told not to be loaded.
    """

    name: str
    distribution: str
    version: str
    registers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None
    is_disabled: bool = False


class Registry:
    """Typed look-ups over what plugins registered. An instance holds the built-ins; ``load`` adds installed plugins.

    Attributes:
        methods: strategies and presets by name; a strategy appears as a preset that fixes nothing.
        spaces: by name.
        formats: in the order in which they are asked, plugins first.
        writers: by name.
        executors: by name.
        reporters: by name.
        plugins: what was loaded, what failed to load, and what is disabled.
        unmatched: names that were to be disabled and are no plugin's.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        self._owners: dict[tuple[str, str], str] = {}
        self.methods: dict[str, Preset] = {}
        self.spaces: dict[str, type[Space]] = {}
        self.formats: dict[str, type[Format]] = {}
        self.writers: dict[str, type[Writer]] = {}
        self.executors: dict[str, type[Executor]] = {}
        self.reporters: dict[str, type[Reporter]] = {}
        self.plugins: list[PluginRecord] = []
        self.unmatched: tuple[str, ...] = ()
        self.register(BuiltIns(), BUILT_IN, distribution=BUILT_IN, version=__version__)

    @classmethod
    def load(cls, *, disabled: Iterable[str] | None = None) -> Registry:
        """The built-ins and every installed plugin that is not disabled.

        A plugin that was made for another version of the API is not imported. It, one that fails to import and one that
        is refused are recorded with the cause and do not take the rest down.

        Args:
            disabled: names of plugins or of their distributions, or ``all``; by default what
                ``MERGEKIT_LOWRANK_DISABLE_PLUGINS`` says.
        """
        registry = cls()
        given = os.environ.get(DISABLE_VARIABLE, "").split(",") if disabled is None else disabled
        names = {name.strip() for name in given} - {""}
        found = [(entry, _unloaded(entry)) for entry in _installed()]
        for entry, record in found:
            registry._load(entry, record, is_disabled=bool(names & {record.name, record.distribution, ALL}))
        matched = {name for _, record in found for name in (record.name, record.distribution)}
        registry.unmatched = tuple(sorted(names - matched - {ALL}))
        return registry

    def _load(self, entry: EntryPoint, record: PluginRecord, *, is_disabled: bool) -> None:
        if is_disabled:
            self.plugins.append(replace(record, is_disabled=True))
            return
        try:
            plugin = _imported(entry, record)
            self.register(plugin, record.name, distribution=record.distribution, version=record.version)
        except PluginError as error:
            self.plugins.append(replace(record, error=str(error)))

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
        except (PluginError, KeyboardInterrupt):
            self._forget(plugin)
            raise
        except BaseException as error:  # a hook may call sys.exit
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
        kinds: dict[str, type] = {
            "spaces": Space,
            "formats": Format,
            "writers": Writer,
            "executors": Executor,
            "reporters": Reporter,
        }
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
        self.writers |= {item.name: item for item in offers["writers"]}
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
        return _look_up(self.methods, name, "merge_method", self._absent())

    def space(self, name: str) -> type[Space]:
        """The space of this name, or RecipeError."""
        return _look_up(self.spaces, name, "space", self._absent())

    def spaces_of(self, method: Preset) -> tuple[str, ...]:
        """The spaces in which a method may be used, its default first."""
        if method.space is not None:
            return (method.space,)
        others = (name for name in self.spaces if name not in method.strategy.spaces)
        return (*method.strategy.spaces, *(name for name in others if method.strategy.supports(name)))

    def executor(self, name: str) -> type[Executor]:
        """The executor of this name, or RecipeError."""
        return _look_up(self.executors, name, "executor", self._absent())

    def writer(self, name: str) -> type[Writer]:
        """The writer of this name, or RecipeError."""
        return _look_up(self.writers, name, "format to write", self._absent())

    def _absent(self) -> str:
        """The plugins that could have had a name which is not known."""
        failed = ", ".join(f"'{record.name}'" for record in self.plugins if record.error)
        disabled = ", ".join(f"'{record.name}'" for record in self.plugins if record.is_disabled)
        said = {"plugins that failed to load": failed, "plugins that are disabled": disabled}
        parts = [f"{what}: {names}" for what, names in said.items() if names]
        return f" ({'; '.join(parts)}; see `mergekit-lowrank plugins`)" if parts else ""


def _installed() -> list[EntryPoint]:
    """Entry points of installed plugins for any version of the API, in an order that does not depend on the machine."""
    found = entry_points()
    entries = [entry for group in found.groups if ANY_GROUP.fullmatch(group) for entry in found.select(group=group)]
    return sorted(entries, key=lambda entry: (entry.name, entry.dist.name if entry.dist else "", entry.group))


def _unloaded(entry: EntryPoint) -> PluginRecord:
    name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
    return PluginRecord(entry.name, name, version)


def _imported(entry: EntryPoint, record: PluginRecord) -> object:
    """What the entry point names, imported only if it was made for this version of the API."""
    match = ANY_GROUP.fullmatch(entry.group)
    if entry.group != ENTRY_POINT_GROUP:
        raise PluginError(_version_problem(record, match["api"] if match else None))
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may call sys.exit
        raise PluginError(f"importing {entry.value} failed: {type(error).__name__}: {error}") from error


def _version_problem(record: PluginRecord, api: str | None) -> str:
    who = f"{record.distribution} {record.version}".strip() or f"plugin '{record.name}'"
    speaks = f"{BUILT_IN} {__version__} speaks API {API_VERSION}"
    if api is None:
        return (
            f"{who} is registered in the entry-point group '{PROJECT}', which names no version of the plugin API; "
            f"{speaks}. It was not imported. Its author registers it in the group '{ENTRY_POINT_GROUP}'."
        )
    remedy = f"install a release of {record.distribution or 'it'} for API {API_VERSION}"
    newer = f"upgrade {BUILT_IN}, or " if int(api) > API_VERSION else ""
    return f"{who} was made for plugin API {api}; {speaks}. It was not imported: {newer}{remedy}."


def _look_up(known: Mapping[str, Kind], name: str, what: str, absent: str) -> Kind:
    if name in known:
        return known[name]
    nearest = nearest_name(name, known)
    hint = f"; did you mean '{nearest}'?" if nearest else "."
    raise RecipeError(f"unknown {what} '{name}'{hint}{absent} Known: {', '.join(sorted(known))}.")


def _check_extension(plugin: str, hook: str, item: Any, kind: type) -> None:
    cls = item.strategy if hook == "strategies" and isinstance(item, Preset) else item
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise PluginError(f"plugin '{plugin}': hook '{hook}' returned {item!r}; expected subclasses of {kind.__name__}")
    missing = [name for name in ("name", "summary") if not isinstance(getattr(item, name, None), str)]
    missing += sorted(getattr(cls, "__abstractmethods__", ()))
    if issubclass(cls, Strategy) and not (isinstance(getattr(cls, "spaces", None), tuple | list) and cls.spaces):
        missing.append("spaces (a tuple of names)")
    if missing:
        raise PluginError(f"plugin '{plugin}': {item!r} lacks {', '.join(missing)}")
    if issubclass(cls, ElementwiseStrategy) and not _overrides(cls, ("merge_block", "merge_part", "merge")):
        raise PluginError(f"plugin '{plugin}': {item!r} implements none of merge_block, merge_part and merge")
    if issubclass(cls, Strategy | Space):
        _check_params(plugin, item.name, cls.Params, Params if issubclass(cls, Strategy) else SpaceParams)


def _check_params(plugin: str, name: str, params: Any, kind: type[BaseModel]) -> None:
    if not (isinstance(params, type) and issubclass(params, kind)):
        raise PluginError(
            f"plugin '{plugin}': Params of '{name}' is {params!r}; expected a subclass of {kind.__name__}"
        )
    taken = RESERVED_PARAMETERS & set(params.model_fields)
    if taken:
        raise PluginError(f"plugin '{plugin}': '{name}' has a parameter called {', '.join(taken)}, a reserved name")


def _overrides(cls: type[ElementwiseStrategy], names: Sequence[str]) -> bool:
    return any(getattr(cls, name) is not getattr(ElementwiseStrategy, name) for name in names)


def _hook_problem(name: str, plugin: object, error: BaseException) -> str:
    misspelt = [
        attribute
        for attribute in dir(plugin)
        if hasattr(getattr(plugin, attribute, None), f"{PROJECT}_impl") and attribute not in HOOKS
    ]
    if not misspelt:
        return f"plugin '{name}': {type(error).__name__}: {error}"
    nearest = nearest_name(misspelt[0], HOOKS)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return f"plugin '{name}': there is no hook '{misspelt[0]}'{hint} Hooks: {', '.join(HOOKS)}."
