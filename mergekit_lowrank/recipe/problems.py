"""What is wrong with a recipe, each problem in one line: where, which key, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mergekit_lowrank.errors import RecipeError, nearest_name
from mergekit_lowrank.recipe.execution import Execution
from mergekit_lowrank.recipe.models import ModelEntry, Recipe, Rule
from mergekit_lowrank.recipe.origin import Loc, Origin, shown
from mergekit_lowrank.recipe.output import Output
from mergekit_lowrank.recipe.strict import Strict
from mergekit_lowrank.recipe.values import PARAMETERS_INSTEAD, Filtered

__all__ = ["problems_in"]

NO_CHAT_TEMPLATE = "it goes with the tokenizer; write tokenizer_source: with the model whose template is to be kept"

INSTEAD = {
    **PARAMETERS_INSTEAD,
    "slices": "modules are merged by name; to treat layers differently use a list over depth, {filter, value} or rules",
    "modules": "use 'rules' to treat parts of a model differently",
    "tokenizer": "write tokenizer_source: base, or a model of the recipe",
    "chat_template": NO_CHAT_TEMPLATE,
    "out_shard_size": "write 'shard_size' under 'output', beside kind: model",
    **dict.fromkeys(("kind", "rank", "shard_size"), "write it under 'output'"),
    **dict.fromkeys(("memory", "vram", "device", "executor", "workers"), "write it under 'execution'"),
    "weight": "write it under 'parameters' of an entry of 'models'",
    "density": "write it under 'parameters'",
    "normalize": "write it under 'parameters'",
}
"""Keys of mergekit's that mean nothing here, and keys that people put in the wrong place: what to do instead."""

WORDING = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "invalid_key": "text as a key",
    "model_type": "a mapping",
    "string_type": "text",
    "too_short": "a list with at least one entry",
    "tuple_type": "a list",
}
"""What pydantic's kinds of error expect, in the words of a recipe."""

NOT_IN_RECIPE = ("<scalar>", "<gradient>", "<filters>", "<product>", "<listed>", "[key]")
"""Steps that pydantic adds to the way to a value."""

PARTS: dict[str | int, type[Strict]] = {"models": ModelEntry, "output": Output, "rules": Rule, "execution": Execution}


def problems_in(error: ValidationError, origin: Origin) -> Iterator[RecipeError]:
    """Each problem that validating a recipe found."""
    for details in error.errors(include_url=False):
        if details["type"] == "too_short" and details["input"]:
            continue  # pydantic counts valid entries only, and the invalid ones are reported by themselves
        yield RecipeError(_sentence(details, origin))


def _sentence(details: ErrorDetails, origin: Origin) -> str:
    kind, context = details["type"], details.get("ctx", {})
    loc = tuple(step for step in details["loc"] if step not in NOT_IN_RECIPE) + context.get("at", ())
    is_key = kind == "extra_forbidden" or "[key]" in details["loc"]
    prefix = origin.prefix(loc, key=is_key)
    if kind == "extra_forbidden":
        return f"{prefix}: unknown key {shown(details['loc'][-1])}; {_advice(loc)}"
    if kind == "missing":
        return f"{prefix}: missing key {shown(loc[-1])}"
    if kind == "refused":
        return f"{prefix}: {context['why']}"
    what = context.get("what") or WORDING.get(kind)
    found = shown(context.get("found", details["input"]))
    return f"{prefix}: expected {what}, found {found}" if what else f"{prefix}: {details['msg']}, found {found}"


def _advice(loc: Loc) -> str:
    """What to write in place of the unknown key at the end of ``loc``."""
    known, key = _known_keys(loc[:-1]), str(loc[-1] if loc else "")
    if key in INSTEAD:
        return INSTEAD[key]
    nearest = nearest_name(key, known)
    return f"did you mean {nearest!r}?" if nearest else f"the keys here are {', '.join(known)}"


def _known_keys(parent: Loc) -> list[str]:
    if "parameters" in parent:
        return list(Filtered.model_fields)
    return list((PARTS[parent[0]] if parent else Recipe).model_fields)
