"""Every built-in space keeps the contract."""

from __future__ import annotations

from typing import Any

from mergekit_lowrank.registry import Registry
from mergekit_lowrank.testing import SpaceContract


class BuiltInContract(SpaceContract):
    """Of the spaces of this package, whatever else is installed."""

    @classmethod
    def registry(cls) -> Registry:
        return Registry()


def contract(space: str, **attributes: Any) -> type[BuiltInContract]:
    return type(f"Test_{space}", (BuiltInContract,), {"space": space, **attributes, "__module__": __name__})


globals().update({f"Test_{space}": contract(space) for space in Registry().spaces})


TestJointVertical = contract("joint", parameters={"direction": "vertical"})
