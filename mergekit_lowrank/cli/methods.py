"""``strategies``: the methods there are, and their parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click
from pydantic import BaseModel

from mergekit_lowrank.cli.tables import aligned, fields
from mergekit_lowrank.registry import BUILT_IN, Registry
from mergekit_lowrank.strategies import Preset

__all__ = ["parameters_of", "run_strategies"]

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def run_strategies(name: str | None, *, as_json: bool) -> None:
    """Print all methods, or one with its parameters."""
    registry = Registry.load()
    methods = [registry.method(name)] if name else sorted(registry.methods.values(), key=lambda preset: preset.name)
    if as_json:
        click.echo(json.dumps([_as_dict(preset, registry) for preset in methods], indent=1))
    elif name:
        click.echo("\n".join(_details(methods[0], registry)))
    else:
        click.echo("\n".join(fields(pair for preset in methods for pair in _summary(preset, registry))))
        click.echo("\nThe first space is the default. Parameters: mergekit-lowrank strategies NAME")


def _summary(preset: Preset, registry: Registry) -> Iterator[tuple[str, str]]:
    yield preset.name, preset.summary
    where = f"in {', '.join(registry.spaces_of(preset))}"
    yield "", f"{where}; {preset.paper}" if preset.paper else where


def parameters_of(preset: Preset, registry: Registry) -> list[dict[str, Any]]:
    """The method's own parameters, then those of its spaces, each with the default that it has for this method."""
    strategy = preset.strategy
    fixed = {**strategy.space_defaults, **preset.parameters}
    per_input = strategy.Params.per_input_names()
    own = [
        {**described, "belongs_to": "strategy", "per_input": described["name"] in per_input}
        for described in _described(strategy.Params, fixed)
    ]
    theirs = [
        {**described, "belongs_to": "space", "space": name, "per_input": False}
        for name in registry.spaces_of(preset)
        for described in _described(registry.space(name).Params, fixed)
    ]
    return own + theirs


def _described(params: type[BaseModel], fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, schema in params.model_json_schema().get("properties", {}).items():
        described = {"name": name, "type": _type(schema), "default": fixed.get(name, schema.get("default"))}
        bounds = {bound: schema[bound] for bound in BOUNDS if bound in schema}
        choices = {"choices": schema["enum"]} if "enum" in schema else {}
        yield {**described, **bounds, **choices, "description": schema.get("description", "")}


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    return str(schema.get("type", "any"))


def _as_dict(preset: Preset, registry: Registry) -> dict[str, Any]:
    strategy = preset.strategy
    return {
        "name": preset.name,
        "summary": preset.summary,
        "paper": preset.paper,
        "spaces": list(registry.spaces_of(preset)),
        "parameters": parameters_of(preset, registry),
        "preset_of": _preset_of(preset),
        "plugin": registry.owner("strategies", preset.name),
        "min_inputs": strategy.min_inputs,
        "max_inputs": strategy.max_inputs,
        "default_rank": preset.default_rank,
        "has_artefacts": strategy.has_artefacts(),
        "is_random": strategy.is_random,
        "is_order_free": strategy.is_order_free,
    }


def _preset_of(preset: Preset) -> str | None:
    return preset.strategy.name if preset.strategy.name != preset.name else None


def _details(preset: Preset, registry: Registry) -> Iterator[str]:
    yield f"{preset.name}: {preset.summary}"
    yield from fields(_facts(preset, registry), indent="  ")
    yield ""
    rows = [_row(parameter) for parameter in parameters_of(preset, registry)]
    yield from aligned(("parameter", "of", "value", "default", "meaning"), rows)
    yield ""
    yield "Beside these, 'weight' for each model: 1 when left out; most methods take negative ones."


def _facts(preset: Preset, registry: Registry) -> Iterator[tuple[str, str]]:
    if preset.paper:
        yield "paper", preset.paper
    if _preset_of(preset):
        yield "preset of", preset.strategy.name
    default, *others = registry.spaces_of(preset)
    yield "spaces", ", ".join([f"{default} (default)" if others else default, *others])
    if registry.owner("strategies", preset.name) != BUILT_IN:
        yield "plugin", registry.owner("strategies", preset.name)
    if (count := _models(preset)) is not None:
        yield "models", count
    if preset.default_rank != "max":
        yield "rank", f"output.rank is {preset.default_rank} when left out"
    if preset.strategy.has_artefacts():
        yield "artefacts", "writes more than the adapter: artefacts.safetensors"
    if preset.strategy.is_random:
        yield "random", "draws random numbers, from the recipe's seed"
    if not preset.strategy.is_order_free:
        yield "order", "the result depends on the order of the models"


def _models(preset: Preset) -> str | None:
    """How many models the method takes; None for any number."""
    least, most = preset.strategy.min_inputs, preset.strategy.max_inputs
    if most is None:
        return f"at least {least}" if least > 1 else None
    return f"exactly {least}" if least == most else f"{least} to {most}"


def _row(parameter: Mapping[str, Any]) -> tuple[str, ...]:
    owner = f"space {parameter['space']}" if parameter["belongs_to"] == "space" else "method"
    also = "; may be given for one model" if parameter["per_input"] else ""
    default = json.dumps(parameter["default"]).strip('"')
    return parameter["name"], owner, _values(parameter), default, f"{parameter['description']}{also}"


def _values(parameter: Mapping[str, Any]) -> str:
    """What a parameter may be: ``number, >= 0, <= 1``, or its choices."""
    if "choices" in parameter:
        return " | ".join(map(str, parameter["choices"]))
    signs = dict(zip(BOUNDS, (">=", ">", "<=", "<"), strict=True))
    bounds = [f"{sign} {parameter[bound]}" for bound, sign in signs.items() if bound in parameter]
    return ", ".join([parameter["type"], *bounds])
