"""From plain values to a checked recipe, and from a recipe to the variants of its sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from mergekit_lowrank.errors import MergeError, RecipeError, raise_together
from mergekit_lowrank.recipe.document import Document
from mergekit_lowrank.recipe.models import Recipe
from mergekit_lowrank.recipe.origin import Loc, Origin, Place
from mergekit_lowrank.recipe.overrides import changed, overridden, parse_path, replaced, with_scale_for_lambda
from mergekit_lowrank.recipe.problems import problems_in
from mergekit_lowrank.recipe.sweep import Change, Variant, variants_in
from mergekit_lowrank.recipe.weight_files import with_files_read

__all__ = ["checked", "document_of", "variants_of"]


def checked(document: Document, origin: Origin, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``document`` says once ``overrides`` are put over it; its variants are checked too.

    Raises:
        RecipeError: every problem, with its place.
    """
    for override in overrides:
        document = overridden(document, override)
    document = with_files_read(with_scale_for_lambda(document), origin)
    origin = Origin(origin.name, origin.directory, document.places)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise_together(list(problems_in(error, origin)))
        raise  # cannot happen: a validation error holds at least one problem
    recipe._origin = origin
    if recipe.sweep:
        variants_of(recipe)
    return recipe


def document_of(recipe: Recipe) -> Document:
    """What ``recipe`` says, as plain values; in-memory adapters stay the objects they are."""
    data: object = recipe.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    for index, entry in enumerate(recipe.models):
        data = replaced(data, ("models", index, "model"), entry.model)
    if recipe.sweep:
        data = replaced(data, ("sweep",), recipe.sweep)
    return Document(data, recipe._origin.places)


def variants_of(recipe: Recipe) -> tuple[tuple[str, Recipe], ...]:
    """Each variant of the recipe's sweep with its name; the recipe itself, named "", where nothing is swept.

    Raises:
        RecipeError: every problem of every variant, those that several share once.
    """
    if not recipe.sweep:
        return (("", recipe),)
    try:
        variants = variants_in(recipe.sweep)
    except RecipeError as error:
        raise recipe.problem(("sweep",), str(error)) from None
    common = document_of(recipe.model_copy(update={"sweep": {}}))
    made: list[tuple[str, Recipe]] = []
    problems: dict[str, MergeError] = {}
    for variant in variants:
        try:
            made.append((variant.name, _made(recipe, common, variant)))
        except RecipeError as error:  # noqa: PERF203 - the problems of all variants are wanted
            problems |= {str(problem): problem for problem in error.problems}
    raise_together(list(problems.values()))
    return tuple(made)


def _made(recipe: Recipe, document: Document, variant: Variant) -> Recipe:
    for change in variant.changes:
        document = _changed(recipe, document, change)
    return checked(document, recipe._origin)


def _changed(recipe: Recipe, document: Document, change: Change) -> Document:
    try:
        return changed(document, parse_path(change.path), change.value, _places(recipe, change))
    except RecipeError as error:
        raise recipe.problem(change.key_at, str(error), key=True) from None


def _places(recipe: Recipe, change: Change) -> Mapping[Loc, Place]:
    """The places of a swept value and of what it holds."""
    depth = len(change.value_at)
    inner = {loc[depth:]: place for loc, place in recipe._origin.places.items() if loc[:depth] == change.value_at}
    own = Place(recipe.where(change.key_at, key=True), recipe.where(change.value_at))
    return {**inner, (): own}
