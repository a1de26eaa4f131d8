"""What the contracts have in common: where they find what they test."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from mergekit_lowrank.hookspecs import hookimpl
from mergekit_lowrank.registry import Registry

__all__ = ["Contract"]


class Contract:
    """A suite of tests to inherit.

    Attributes:
        plugin: the module or object with the hooks; left out, names are looked up in what is installed.
    """

    plugin: ClassVar[object | None] = None

    @classmethod
    def registry(cls) -> Registry:
        """Where names are looked up: what is installed, or the built-ins with what the contract brings."""
        contract: Any = cls
        return _registry(contract)

    @classmethod
    def alone(cls) -> dict[str, Any]:
        """A class that is given in place of a name, by its hook."""
        return {}


@cache
def _registry(contract: Any) -> Registry:
    alone = contract.alone()
    if contract.plugin is None and not alone:
        return Registry.load()
    registry = Registry()
    if contract.plugin is not None:
        registry.register(contract.plugin, "contract")
    for hook, extension in alone.items():
        registry.register(_offer(hook, [extension]), extension.name)
    return registry


def _offer(hook: str, extensions: Sequence[Any]) -> object:
    """A plugin with one hook."""
    return type("Offer", (), {hook: staticmethod(hookimpl(lambda: extensions))})
