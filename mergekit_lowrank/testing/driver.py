"""A small stand-in for the engine: strategies run alone, nothing is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, Update, densify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import Coordinates, Space
from mergekit_lowrank.strategies import MergeContext, Preset, Strategy

__all__ = ["Subject", "merge_coordinates", "merge_modules", "merge_updates", "subjects"]


def merge_modules(
    strategy: Strategy,
    space: Space,
    modules: Mapping[str, Sequence[InputUpdate]],
    weights: Sequence[float],
    **facts: Any,
) -> dict[str, Update]:
    """The merged update of every module, before scale and rank policies; surveys first where the strategy has one.

    Args:
        strategy: with its parameters.
        space: one of those the strategy supports, with its parameters.
        modules: the n updates of each module by its name; measured and merged in this order.
        weights: n coefficients.
        facts: what else the context holds, as in ``MergeContext``; by default every input takes part in every module.
    """
    encoded = {name: space.encode(updates, weights) for name, updates in modules.items()}
    return merge_coordinates(strategy, encoded, **facts)


def merge_updates(
    strategy: Strategy,
    space: Space,
    updates: Sequence[InputUpdate],
    weights: Sequence[float] | None = None,
    **facts: Any,
) -> Update:
    """The merged update of one module alone; all weights 1 unless given."""
    own = weights if weights is not None else (1.0,) * len(updates)
    name = facts.pop("module", "module")
    return merge_modules(strategy, space, {name: updates}, own, **facts)[name]


def merge_coordinates(strategy: Strategy, modules: Mapping[str, Coordinates], **facts: Any) -> dict[str, Update]:
    """The same from coordinates."""
    survey = strategy.survey()

    def context(name: str) -> MergeContext:
        weights = modules[name].weights
        known = {"participants": tuple(range(len(weights))), "total_weight": sum(weights), "survey": survey}
        return MergeContext(module=name, weights=weights, **(known | facts))

    unfinished = survey is not None
    while survey is not None and unfinished:
        first, *others = [survey.measure(modules[name], context(name)) for name in modules]
        for measured in others:
            first = first + measured
        unfinished = survey.conclude(first)
    return {name: strategy.merge(coordinates, context(name)) for name, coordinates in modules.items()}


@dataclass(frozen=True)
class Subject:
    """A method in one of its spaces, ready to run.

    Attributes:
        preset: the method.
        space_kind: the space.
        parameters: those that replace defaults of the method.
    """

    preset: Preset
    space_kind: type[Space]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def strategy(self, **parameters: Any) -> Strategy:
        """The strategy with these parameters; names that it does not have are left out."""
        kind = self.preset.strategy
        return kind(_known(kind.Params, {**self.preset.parameters, **self.parameters, **parameters}))

    def space(self) -> Space:
        """The space with the defaults that the method gives it."""
        given = {**self.preset.strategy.space_defaults, **self.preset.parameters, **self.parameters}
        return self.space_kind(_known(self.space_kind.Params, given))

    def counted(self, values: Sequence[Any]) -> list[Any]:
        """As many of ``values`` as the method takes inputs: the first ones, or all of them again and again."""
        kind = self.preset.strategy
        count = max(len(values), kind.min_inputs)
        count = count if kind.max_inputs is None else min(count, kind.max_inputs)
        return [values[i % len(values)] for i in range(count)]

    def takes_dense(self) -> bool:
        """Whether updates may be dense."""
        return self.preset.strategy.takes_dense and self.space_kind.takes_dense

    def update(self, updates: Sequence[InputUpdate], weights: Sequence[float] | None = None, **given: Any) -> Update:
        """The merged update of one module; ``given`` are parameters, or facts of the context."""
        facts = {name: given.pop(name) for name in tuple(given) if name in MergeContext.__dataclass_fields__}
        return merge_updates(self.strategy(**given), self.space(), updates, weights, **facts)

    def merged(self, updates: Sequence[InputUpdate], weights: Sequence[float] | None = None, **given: Any) -> Tensor:
        """The same as a dense delta."""
        return densify(self.update(updates, weights, **given))


def subjects(registry: Registry, methods: Iterable[Preset]) -> Iterator[Subject]:
    """Every method in every space that it works in."""
    for preset in methods:
        yield from (Subject(preset, registry.spaces[name]) for name in registry.spaces_of(preset))


def _known(model: type[Any], given: Mapping[str, Any]) -> Any:
    made: BaseModel = model(**{name: value for name, value in given.items() if name in model.model_fields})
    return made
