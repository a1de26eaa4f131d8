"""The values a parameter may take, and what each comes to for one module."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mergekit_lowrank.recipe.origin import Loc, shown
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, Strict, expected, refused, told_as

__all__ = [
    "Depths",
    "Filtered",
    "Gradient",
    "Number",
    "Parameters",
    "Pattern",
    "Scalar",
    "Text",
    "Value",
    "leaves",
    "matches",
    "resolve",
    "unused_filters",
]

INT64_MAX = 2**63 - 1

PARAMETERS_INSTEAD = {
    "int8_mask": "leave it out: modules are merged one at a time, so masks need no saving",
    "lambda": "write 'scale' beside 'merge_method' (where both stand, they must be equal)",
}
"""Parameters of mergekit's that are none here, and what to do instead."""


def _check_pattern(pattern: str) -> str:
    kind, colon, expression = pattern.partition(":")
    if kind in ("glob", "regex") and colon and not expression:
        raise expected(f"a pattern after '{kind}:'")
    if kind == "regex" and colon:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what Python only warns about is ambiguous
                re.compile(expression)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise refused(f"{shown(expression)} is not a regular expression: {error}") from None
    return pattern


def _check_parameter_name(name: str) -> str:
    if name in PARAMETERS_INSTEAD:
        raise refused(f"{name!r} is not a parameter here; {PARAMETERS_INSTEAD[name]}")
    return name


def _shape(value: Any) -> str:
    """Which kind of value this is meant to be; the angle brackets keep the word out of errors."""
    if not isinstance(value, list | tuple):
        return "<scalar>"
    return "<filters>" if any(isinstance(entry, Mapping | Filtered) for entry in value) else "<gradient>"


def _single_shape(value: Any) -> str:
    return "<gradient>" if isinstance(value, list | tuple) else "<scalar>"


def _default_comes_last(entries: tuple[Filtered, ...]) -> tuple[Filtered, ...]:
    for index, entry in enumerate(entries[:-1]):
        if entry.filter in (None, "*"):
            raise refused(
                "this entry takes every module, so the entries after it never apply; put it last", at=(index,)
            )
    return entries


Text = Annotated[str, Field(min_length=1), told_as("text that is not empty")]

Pattern = Annotated[Text, AfterValidator(_check_pattern)]
"""Part of a module's name, ``glob:`` and a pattern for the whole name, or ``regex:`` and an expression to search."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False), told_as("a finite number")]

Scalar = Annotated[
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True, ge=-INT64_MAX, le=INT64_MAX)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[str, Field(strict=True)],
    told_as(
        "a finite number, text, true, false or a list (of numbers over depth, or of {filter, value}), or {file: PATH}"
    ),
]

Gradient = Annotated[tuple[Number, ...], Field(min_length=1), LIST_TO_TUPLE]
"""Points equally spaced over depth, from the first layer to the last."""


class Filtered(Strict):
    """The value of a parameter for the modules that a filter matches."""

    filter: Pattern | None = Field(
        default=None,
        description="Part of a module's name; or `glob:` and a pattern of the whole name; or `regex:` and an "
        "expression to find in it. Left out or `*`: every module.",
    )
    value: Annotated[
        Annotated[Scalar, Tag("<scalar>")] | Annotated[Gradient, Tag("<gradient>")], Discriminator(_single_shape)
    ] = Field(description="A scalar, or a list of numbers that are interpolated over depth.")


Filters = Annotated[tuple[Filtered, ...], LIST_TO_TUPLE, AfterValidator(_default_comes_last)]


class _OrFile:
    """Adds ``{file: PATH}`` to a JSON Schema. A file is read, and put in as filters, before a recipe is checked."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        inner = handler(schema)
        file = {"file": {"type": "string", "minLength": 1}}
        inner["oneOf"].append(
            {"type": "object", "properties": file, "required": ["file"], "additionalProperties": False}
        )
        return inner


Value = Annotated[
    Annotated[Scalar, Tag("<scalar>")] | Annotated[Gradient, Tag("<gradient>")] | Annotated[Filters, Tag("<filters>")],
    Discriminator(_shape),
    _OrFile,
]
"""A scalar; a list of numbers, interpolated over depth; or a list of ``{filter, value}``, the first match wins."""


def _weight_is_numeric(parameters: dict[str, Value]) -> dict[str, Value]:
    for at, leaf in leaves(parameters.get("weight", 1.0)):
        if isinstance(leaf, bool | str):
            raise expected("a finite number", at=("weight", *at), found=leaf)
    return parameters


Parameters = Annotated[
    dict[Annotated[str, AfterValidator(_check_parameter_name)], Value], AfterValidator(_weight_is_numeric)
]


def leaves(value: Value) -> Iterator[tuple[Loc, Scalar]]:
    """Each scalar that ``value`` holds, with the way to it, so that a check can say where one is out of range."""
    if not isinstance(value, tuple):
        yield (), value
        return
    for index, entry in enumerate(cast("tuple[Filtered | float, ...]", value)):
        if isinstance(entry, Filtered):
            yield from (((index, "value", *at), leaf) for at, leaf in leaves(entry.value))
        else:
            yield (index,), entry


def matches(pattern: str, module: str) -> bool:
    """Whether ``pattern`` takes in ``module``: a part of its name, ``glob:``, ``regex:``, or ``*`` for every one."""
    if pattern.startswith("glob:"):
        return fnmatch.fnmatchcase(module, pattern.removeprefix("glob:"))
    if pattern.startswith("regex:"):
        return re.search(pattern.removeprefix("regex:"), module) is not None
    return pattern == "*" or pattern in module


def resolve(value: Value, module: str, *, depth: float) -> Scalar | None:
    """What ``value`` comes to for one module at relative ``depth`` in [0, 1]; None where no filter matches."""
    if not isinstance(value, tuple):
        return value
    if not isinstance(value[0], Filtered):
        return _interpolate(value, depth)
    for entry in value:
        if entry.filter is None or matches(entry.filter, module):
            return resolve(entry.value, module, depth=depth)
    return None


def unused_filters(value: Value, modules: Sequence[str]) -> list[str]:
    """The filters of ``value`` that take none of the modules: no name matches, or filters before them take it."""
    if not isinstance(value, tuple) or not isinstance(value[0], Filtered):
        return []
    filters = [entry.filter or "*" for entry in value]
    used = {next((own for own in filters if matches(own, module)), None) for module in modules}
    return [own for own in dict.fromkeys(filters) if own not in used and own != "*"]


def _interpolate(points: Sequence[float], depth: float) -> float:
    """Linear between equally spaced ``points``: exact at each of them, never outside the two it lies between."""
    position = depth * (len(points) - 1)
    index = min(int(position), max(len(points) - 2, 0))
    near, far = points[index], points[min(index + 1, len(points) - 1)]
    share = position - index
    between = (1.0 - share) * near + share * far
    return min(max(between, min(near, far)), max(near, far))


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.|$)")
_BEFORE_LAYERS = re.compile(r"(?:^|[._])(?:embed(?!_out)|patch|wte|wpe|stem|conv_in|proj_in)")


class Depths:
    """How deep each module lies, 0 at the first layer and 1 at the last of its tower, whatever the modules' order.

    The layer is the first number that follows ``layers``, ``layer``, ``h``, ``blocks`` or ``block`` in a name. What
    stands before it names the tower: a text and a vision encoder are counted apart. A tower of one layer has depth 0.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for tower, layer in filter(None, map(_layer, modules)):
            self._last[tower] = max(layer, self._last.get(tower, 0))

    def of(self, module: str) -> float:
        """The relative depth of one of the modules: 0 for embeddings outside any layer, 1 for a head."""
        found = _layer(module)
        if found is None:
            return 0.0 if _BEFORE_LAYERS.search(module) else 1.0
        tower, layer = found
        return layer / self._last[tower] if self._last[tower] else 0.0


def _layer(module: str) -> tuple[str, int] | None:
    match = _LAYER.search(module)
    return (module[: match.start(1)], int(match[1])) if match else None
