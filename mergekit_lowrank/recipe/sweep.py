"""What the sweep section of a recipe may say: the variants of a recipe, by the values that they change."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.origin import Loc, shown
from mergekit_lowrank.recipe.overrides import parse_path
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, expected, refused

__all__ = ["Change", "Sweep", "Variant", "variants_in"]

MAX_VARIANTS = 1000
"""Of one recipe; a product of long lists is more likely a slip than a plan."""

MAX_NAME = 120
"""Characters of a variant's name: file systems take 255, and more is put around it while it is written."""

NAME = "name"
"""The key of a listed variant that is no path."""

RESERVED = "sweep.json"
"""What stands beside the variants in their directory."""

_FIXED_OUTPUT = (("output",), ("output", "kind"), ("output", "shard_size"))
_FIXED = ("models", "base_model", "dtype", "extras", "execution", "sweep")
_SAFE_NAME = re.compile(rf"\w[\w.,=+-]{{0,{MAX_NAME - 1}}}(?<!\.)", re.ASCII)
_SAFE = (
    f"at most {MAX_NAME} of the characters A-Z a-z 0-9 _ . , = + -, the first a letter, a digit or _, the last not ."
)


def _is_swept(path: str) -> str:
    try:
        loc = parse_path(path)
    except RecipeError:
        raise expected("a key path, such as parameters.density or models[0].parameters.weight") from None
    if loc[-1] == "lambda":
        raise refused("mergekit's 'lambda' is 'scale' here; sweep scale")
    is_of_input = len(loc) > 3 and loc[0] == "models" and loc[2] == "parameters"
    if (loc[0] in _FIXED and not is_of_input) or loc in _FIXED_OUTPUT:
        raise refused(
            f"{shown(path)} cannot be swept: the inputs, the base model, output.kind, output.shard_size, dtype, extras "
            "and execution are the same in all variants; write a second recipe"
        )
    return path


def _is_swept_or_name(key: str) -> str:
    return key if key == NAME else _is_swept(key)


def _do_not_overlap(paths: dict[str, Any]) -> dict[str, Any]:
    locs = [(parse_path(path), path) for path in paths if path != NAME]
    for (outer, first), (inner, second) in itertools.permutations(locs, 2):
        if inner[: len(outer)] == outer:
            raise refused(f"{shown(first)} sets {shown(second)} as well; keep one of the two", at=(second,))
    return paths


def _is_variant(variant: dict[str, Any]) -> dict[str, Any]:
    if not variant:
        raise refused(
            "this variant changes nothing; give it a key path and a value, or a name to keep the recipe as it is"
        )
    name = variant.get(NAME, "_")
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
        raise expected(f"a name for a directory: {_SAFE}", at=(NAME,), found=name)
    return _do_not_overlap(variant)


def _form(sweep: Any) -> str | None:
    """Which of the two forms is meant; the angle brackets keep the word out of errors."""
    if isinstance(sweep, list | tuple):
        return "<listed>"
    return "<product>" if isinstance(sweep, Mapping) else None


Product = Annotated[
    dict[
        Annotated[str, AfterValidator(_is_swept)],
        Annotated[tuple[Any, ...], Field(min_length=1), LIST_TO_TUPLE],
    ],
    AfterValidator(_do_not_overlap),
]

Listed = Annotated[
    tuple[
        Annotated[dict[Annotated[str, AfterValidator(_is_swept_or_name)], Any], AfterValidator(_is_variant)],
        ...,
    ],
    Field(min_length=1),
    LIST_TO_TUPLE,
]

Sweep = Annotated[
    Annotated[Product, Tag("<product>")] | Annotated[Listed, Tag("<listed>")],
    Discriminator(
        _form,
        custom_error_type="expected",
        custom_error_message="expected {what}",
        custom_error_context={"what": "a mapping of key paths to lists of values, or a list of variants"},
    ),
]
"""Lists of values by key path, of which every combination is a variant; or the variants themselves."""


@dataclass(frozen=True)
class Change:
    """One value that a variant changes.

    Attributes:
        path: to the value, as the sweep has it.
        value: what it becomes.
        key_at: where the path stands in the recipe.
        value_at: where the value does.
    """

    path: str
    value: Any
    key_at: Loc
    value_at: Loc


@dataclass(frozen=True)
class Variant:
    """What one variant changes, and what it is called."""

    name: str
    changes: tuple[Change, ...]


def variants_in(sweep: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> list[Variant]:
    """Every variant of a checked sweep. In a product the last key changes fastest.

    Raises:
        RecipeError: too many of them, or names that are not safe and unique.
    """
    if isinstance(sweep, Mapping) and math.prod(map(len, sweep.values())) > MAX_VARIANTS:
        count = math.prod(map(len, sweep.values()))
        raise RecipeError(f"{count:,} variants, and at most {MAX_VARIANTS:,} are allowed; sweep fewer values at once")
    named = list(_of_product(sweep) if isinstance(sweep, Mapping) else _of_list(sweep))
    labels = _labels({change.path for _, changes in named for change in changes})
    variants = [Variant(name or _name(changes, labels), changes) for name, changes in named]
    _check_names([variant.name for variant in variants])
    return variants


def _of_product(sweep: Mapping[str, Sequence[Any]]) -> Iterator[tuple[None, tuple[Change, ...]]]:
    axes = [
        [Change(path, value, ("sweep", path), ("sweep", path, index)) for index, value in enumerate(values)]
        for path, values in sweep.items()
    ]
    return ((None, changes) for changes in itertools.product(*axes))


def _of_list(sweep: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str | None, tuple[Change, ...]]]:
    for index, variant in enumerate(sweep):
        places = {path: ("sweep", index, path) for path in variant if path != NAME}
        yield variant.get(NAME), tuple(Change(path, variant[path], at, at) for path, at in places.items())


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """The last key of each path, or all its keys where several end alike."""
    locs = {path: [str(step) for step in parse_path(path)] for path in paths}
    ends = Counter(loc[-1] for loc in locs.values())
    return {path: loc[-1] if ends[loc[-1]] == 1 else ".".join(loc) for path, loc in locs.items()}


def _name(changes: Iterable[Change], labels: Mapping[str, str]) -> str:
    return ",".join(f"{labels[change.path]}={_text(change.value)}" for change in changes)


def _text(value: Any) -> str:
    """A value in letters, digits and ``_ . + -``."""
    if isinstance(value, Mapping):
        return "_".join(f"{_text(key)}-{_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "_".join(map(_text, value))
    text = value if isinstance(value, str) else shown(value)
    return re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)


def _check_names(names: Sequence[str]) -> None:
    instead = "write the sweep as a list of variants, each with a name of its own"
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise RecipeError(
                f"a variant would be called {shown(name)}, which is no name for a directory ({_SAFE}); {instead}"
            )
    name, count = Counter([RESERVED, *(name.casefold() for name in names)]).most_common(1)[0]
    if name == RESERVED and count > 1:
        raise RecipeError(f"a variant is called '{RESERVED}', which is the list of all variants; choose another name")
    if count > 1:
        raise RecipeError(f"{count} variants would be called '{name}'; {instead}, or leave out what stands twice")
