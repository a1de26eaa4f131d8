"""``init``: a commented recipe for the adapters that there are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import click

from mergekit_lowrank.api import plan
from mergekit_lowrank.cli.methods import parameters_of
from mergekit_lowrank.cli.tables import aligned, one_line
from mergekit_lowrank.engine import Plan
from mergekit_lowrank.formats import Checkpoint, Factored
from mergekit_lowrank.inspection.headers import ranks_text, scaling_text, type_name, types_text
from mergekit_lowrank.recipe import Recipe, parse_recipe, write_yaml
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.strategies import Preset

__all__ = ["run_init"]

EXTRAS = "average"
"""What the draft does with tensors that are no low-rank factors."""
COMMENT_COLUMNS = 100
COLUMNS = ("input", "rank", "scaling", "type", "modules")
WRITTEN_OUT = ("merge_method", "models", "scale", "parameters")
"""Keys of the recipe that are not listed as commented-out defaults."""


def run_init(models: Sequence[str], method: str) -> None:
    """Print the recipe, once it is known to plan without error."""
    registry = Registry.load()
    settings: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        "scale": "auto",
    }
    made = plan(parse_recipe({**settings, "extras": EXTRAS}, name="command line"), registry=registry)
    if any(own.extras for own in made.inputs):
        settings["extras"] = EXTRAS
    click.echo("\n".join(_lines(settings, made, registry)))


def _lines(settings: Mapping[str, object], made: Plan, registry: Registry) -> Iterator[str]:
    preset = registry.method(str(settings["merge_method"]))
    yield from _comment(f"A merge of {len(made.inputs)} adapters of {made.base_model or 'a base model not named'}.")
    yield "#"
    yield from (f"#   {line}" for line in aligned(COLUMNS, map(_found, made.inputs)))
    for warning in made.warnings:
        yield "#"
        yield from _comment(f"Note: {warning}.")
    yield "#"
    yield from _comment("Relative paths start from the directory that this file is in. What it would do, and doing it:")
    yield "#   mergekit-lowrank plan recipe.yaml"
    yield "#   mergekit-lowrank merge recipe.yaml merged/"
    yield "#"
    yield from _comment("Keys that are commented out have the value they show when they are left out.")
    yield ""
    yield from _comment(f"{preset.name}: {preset.summary}. All methods: mergekit-lowrank strategies")
    yield from _yaml({"merge_method": settings["merge_method"]})
    yield ""
    yield from _comment("A weight is 1 when left out; most methods take negative ones.")
    yield from _yaml({"models": settings["models"]})
    yield ""
    yield from _comment(Recipe.model_fields["scale"].description or "")
    yield from _yaml({"scale": settings["scale"]})
    yield ""
    if "extras" in settings:
        yield from _comment(Recipe.model_fields["extras"].description or "")
        yield from _yaml({"extras": settings["extras"]})
        yield ""
    space = registry.spaces_of(preset)[0]
    parameters = [p for p in parameters_of(preset, registry) if p.get("space", space) == space]
    yield from ["#parameters:"] if parameters else []
    for parameter in parameters:
        yield from _comment(parameter["description"], indent="  ")
        yield from (f"#  {line}" for line in _yaml({parameter["name"]: parameter["default"]}))
    defaults = _defaults(made, preset, space).items()
    for key, value in ((key, value) for key, value in defaults if key not in settings):
        yield ""
        example = " For example:" if key == "rules" else ""
        yield from _comment(f"{Recipe.model_fields[key].description}{example}")
        yield from (f"#{line}" for line in _yaml({key: value}))


def _defaults(made: Plan, preset: Preset, space: str) -> dict[str, object]:
    """What each key comes to when it is left out; for ``rules``, an example."""
    kind = made.modules[0].name.rpartition(".")[2]
    defaults = made.recipe.model_dump(mode="json")
    found = {
        "space": space,
        "output": {**defaults["output"], "rank": preset.default_rank},
        "out_dtype": type_name(made.out_dtype),
        "rules": [{"match": kind, "scale": 1.0}],
        "base_model": made.base_model or "org/name",
        "extras": "error",
        "execution": {**defaults["execution"], "device": "auto", "executor": "threads"},
    }
    return {key: found.get(key, defaults[key]) for key in Recipe.model_fields if key not in WRITTEN_OUT}


def _found(checkpoint: Checkpoint) -> tuple[str, ...]:
    headers = [own for own in checkpoint.modules.values() if isinstance(own.layout, Factored)]
    headers = headers or list(checkpoint.modules.values())
    return checkpoint.label, ranks_text(headers), scaling_text(headers), types_text(headers), str(len(headers))


def _comment(text: str, *, indent: str = "") -> Iterator[str]:
    """Prose as comment lines; nothing in it can end the comment."""
    for line in textwrap.wrap(one_line(text), COMMENT_COLUMNS, break_long_words=False, break_on_hyphens=False):
        yield f"# {indent}{line}" if not indent else f"#{indent}# {line}"


def _yaml(data: Mapping[str, object]) -> list[str]:
    """One key and its value in lines."""
    text = write_yaml(data).rstrip()
    return (text[1:-1] if text.startswith("{") else text).splitlines()
