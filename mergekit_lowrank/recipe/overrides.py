"""Changes to a recipe before it is checked: ``--set path=value``, and mergekit's ``lambda`` read as ``scale``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.document import MAX_DEPTH, Document, read_yaml
from mergekit_lowrank.recipe.origin import Loc, Place, dotted, shown

__all__ = ["changed", "overridden", "parse_path", "replaced", "with_scale_for_lambda"]

_PATH = re.compile(r"[\w-]+(?:\[\d{1,9}\]|\.[\w-]+)*")
_EXPECTED = "expected path=value, such as parameters.density=0.5 or models[0].parameters.weight=-1"


@dataclass(frozen=True)
class _Override:
    """One ``path=value``, taken apart; ``name`` is what errors call it."""

    name: str
    loc: Loc
    value: object


def overridden(document: Document, override: str) -> Document:
    """``document`` with ``override``, such as ``models[0].parameters.weight=-1``, put over it.

    Mappings on the way are made where they are missing; lists are not.

    Raises:
        RecipeError: not ``path=value``, a value that is not YAML, or a path through something that has no such entry.
    """
    parsed = _parse(override)
    try:
        return changed(document, parsed.loc, parsed.value, {(): Place(parsed.name, parsed.name)})
    except RecipeError as error:
        raise RecipeError(f"{parsed.name}: {error}") from None


def changed(document: Document, loc: Loc, value: object, places: Mapping[Loc, Place]) -> Document:
    """``document`` with ``value`` at ``loc``; ``places`` are those of the value and, from there, of what it holds.

    Raises:
        RecipeError: a path through something that has no such entry.
    """
    data = replaced(document.data, loc, value)
    kept = {at: place for at, place in document.places.items() if at[: len(loc)] != loc}
    above = {loc[:length]: places[()] for length in range(1, len(loc)) if loc[:length] not in kept}
    return Document(data, {**kept, **above, **{(*loc, *inner): place for inner, place in places.items()}})


def with_scale_for_lambda(document: Document) -> Document:
    """``document`` with mergekit's ``parameters.lambda`` written as ``scale``, in the recipe and in each rule.

    Where ``scale`` is there too and says something else, ``lambda`` stays, and is refused as a parameter.
    """
    rules = document.data.get("rules") if isinstance(document.data, Mapping) else None
    document = _scale_for_lambda(document, (), document.data)
    for index, rule in enumerate(rules if isinstance(rules, list | tuple) else ()):
        document = _scale_for_lambda(document, ("rules", index), rule)
    return document


def _scale_for_lambda(document: Document, loc: Loc, holder: object) -> Document:
    parameters = holder.get("parameters") if isinstance(holder, Mapping) else None
    if not isinstance(holder, Mapping) or not isinstance(parameters, Mapping) or "lambda" not in parameters:
        return document
    value = parameters["lambda"]
    if "scale" in holder and holder["scale"] != value:
        return document
    others = {name: parameter for name, parameter in parameters.items() if name != "lambda"}
    data = replaced(document.data, loc, {**holder, "parameters": others, "scale": value})
    source = document.places.get((*loc, "parameters", "lambda"))
    return Document(data, {**document.places, (*loc, "scale"): source} if source else document.places)


def replaced(data: object, loc: Loc, value: object, *, done: int = 0) -> object:
    """A copy of ``data`` with ``value`` at ``loc``; only what lies on the way is copied.

    Raises:
        RecipeError: something on the way is not a mapping, or not a list of that length.
    """
    if done == len(loc):
        return value
    step, name = loc[done], f"'{dotted(loc[:done])}'" if done else "the recipe"
    if isinstance(step, int):
        if not isinstance(data, list | tuple):
            raise RecipeError(f"{name} is {shown(data)}, not a list, so it has no entry [{step}]")
        if step >= len(data):
            raise RecipeError(f"{name} has {len(data)} entries, counted from [0]; there is no [{step}]")
        return [*data[:step], replaced(data[step], loc, value, done=done + 1), *data[step + 1 :]]
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{name} is {shown(data)}, not a mapping, so it has no key {step!r}")
    return {**data, step: replaced(data.get(step), loc, value, done=done + 1)}


def _parse(override: str) -> _Override:
    name = f"--set {shown(override)[1:-1]}"
    path, equals, text = override.partition("=")
    try:
        loc = parse_path(path.strip())
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
    if not equals:
        raise RecipeError(f"{name}: {_EXPECTED}")
    return _Override(name, loc, read_yaml(text, locate=lambda _line, _column: name).data)


def parse_path(path: str) -> Loc:
    """``("models", 0, "parameters", "weight")`` for ``models[0].parameters.weight``.

    Raises:
        RecipeError: it is no such path, or has too many steps.
    """
    if not _PATH.fullmatch(path):
        raise RecipeError(_EXPECTED)
    steps = re.findall(r"[\w-]+|\[\d+\]", path)
    if len(steps) > MAX_DEPTH:
        raise RecipeError(f"the path has more than {MAX_DEPTH} steps")
    return tuple(int(step[1:-1]) if step.startswith("[") else step for step in steps)
