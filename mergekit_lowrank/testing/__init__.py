"""For the tests of plugins: contracts to inherit, makers of updates and adapters, and a driver of strategies.

The contracts need pytest, and only they do: they are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergekit_lowrank.testing.driver import merge_modules, merge_updates
from mergekit_lowrank.testing.makers import random_update, random_updates, write_tiny_adapter

if TYPE_CHECKING:
    from mergekit_lowrank.testing.format_contract import FormatContract
    from mergekit_lowrank.testing.space_contract import SpaceContract
    from mergekit_lowrank.testing.strategy_contract import StrategyContract

__all__ = [
    "FormatContract",
    "SpaceContract",
    "StrategyContract",
    "merge_modules",
    "merge_updates",
    "random_update",
    "random_updates",
    "write_tiny_adapter",
]

_CONTRACTS = {
    "FormatContract": "format_contract",
    "SpaceContract": "space_contract",
    "StrategyContract": "strategy_contract",
}


def __getattr__(name: str) -> Any:
    if name not in _CONTRACTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    module = f"{__name__}.{_CONTRACTS[name]}"
    pytest.register_assert_rewrite(module)  # so that a failed assert shows its values, as in a test of one's own
    return getattr(importlib.import_module(module), name)
