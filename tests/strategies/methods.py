"""Every registered method in every space that it supports, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import Space
from mergekit_lowrank.strategies import Preset, Strategy
from mergekit_lowrank.testing import merge_updates


@dataclass(frozen=True)
class Method:
    preset: Preset
    space_kind: type[Space]

    @property
    def id(self) -> str:
        return f"{self.preset.name}-{self.space_kind.name}"

    def strategy(self, **parameters: Any) -> Strategy:
        known = self.preset.strategy.Params.model_fields
        chosen = {**self.preset.parameters, **parameters}
        return self.preset.strategy(
            self.preset.strategy.Params(**{name: value for name, value in chosen.items() if name in known})
        )

    def space(self) -> Space:
        known = self.space_kind.Params.model_fields
        chosen = {**self.preset.strategy.space_defaults, **self.preset.parameters}
        return self.space_kind(
            self.space_kind.Params(**{name: value for name, value in chosen.items() if name in known})
        )

    def merged(
        self, updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None, **parameters: Any
    ) -> Tensor:
        return densify(merge_updates(self.strategy(**parameters), self.space(), updates, weights))


def methods() -> Iterator[Method]:
    registry = Registry()
    for preset in registry.methods.values():
        spaces = (preset.space,) if preset.space else preset.strategy.spaces
        yield from (Method(preset, registry.spaces[name]) for name in spaces)


def each(choose: Callable[[Method], bool] = lambda _: True) -> pytest.MarkDecorator:
    chosen = [method for method in methods() if choose(method)]
    assert chosen
    return pytest.mark.parametrize("method", chosen, ids=[method.id for method in chosen])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal to rounding, relative to the largest entry."""
    size = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)
