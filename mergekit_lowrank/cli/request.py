"""What ``merge`` and ``plan`` are asked to take: a recipe file, or a method and models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergekit_lowrank.recipe import Recipe

__all__ = ["MergeCommand", "Request", "Shard", "split_output"]

WEIGHTS = "--weights"
RECIPE_SUFFIXES = (".yaml", ".yml")


class MergeCommand(click.Command):
    """A command whose ``--weights`` takes all numbers that follow it, negative ones too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, ``--weights 0.6 -0.4`` read as ``--weights=0.6 --weights=-0.4``."""
        return super().parse_args(ctx, list(_spread_weights(args)))


def _spread_weights(arguments: Sequence[str]) -> Iterator[str]:
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            yield from (word, *rest)
            return
        takes_more = word == WEIGHTS or word.startswith(f"{WEIGHTS}=")
        numbers = list(takewhile(_is_number, rest)) if takes_more else []
        if word != WEIGHTS or not numbers:
            yield word
        yield from (f"{WEIGHTS}={number}" for number in numbers)
        del rest[: len(numbers)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Shard(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """One of several parts of a merge: ``0/8`` is the first of eight."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The part's number, from 0, and how many there are."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value), re.ASCII)
        if not match:
            self.fail(f"'{value}' is no part; expected I/N, as in 0/8 for the first of eight", param, ctx)
        index, count = int(match[1]), int(match[2])
        if index >= count:
            known = (
                f"parts are counted from 0, so the last of {count} is {count - 1}/{count}" if count else "there are 0"
            )
            self.fail(f"'{value}': {known}", param, ctx)
        return index, count


def split_output(names: tuple[str, ...], output: str | None, method: str | None) -> tuple[tuple[str, ...], Path]:
    """The names without the output, and the output: ``-o``, or the second name after a recipe.

    Raises:
        click.UsageError: no output is named.
    """
    if output is not None:
        return names, Path(output)
    if method is None and len(names) == 2:
        return names[:1], Path(names[1])
    raise click.UsageError("there is no output; add -o OUT" if names else "name a recipe and an output")


@dataclass(frozen=True)
class Request:
    """A recipe file, or a method with models and weights; and what overrides either.

    Attributes:
        names: the recipe; with ``method`` the models.
        method: of a merge without a recipe file.
        weights: one for each model, or none.
        overrides: each ``key=value``.

    Raises:
        click.UsageError: the parts do not go together.
    """

    names: tuple[str, ...]
    method: str | None = None
    weights: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem_of_recipe() if self.method is None else self._problem_of_models()
        if problem:
            raise click.UsageError(problem)

    def _problem_of_recipe(self) -> str | None:
        if not self.names:
            return "name a recipe, or a method and models: --method NAME MODEL MODEL"
        if len(self.names) > 1 or Path(self.names[0]).is_dir():
            what = f"'{self.names[0]}' is a directory" if Path(self.names[0]).is_dir() else "a recipe is one file"
            return f"{what}; to merge adapters without a recipe, add --method NAME (see the command strategies)"
        if self.weights:
            return "--weights goes with --method; a recipe has its own, changed by --set models[0].parameters.weight=1"
        return None

    def _problem_of_models(self) -> str | None:
        if not self.names:
            return "--method goes with models: --method NAME MODEL MODEL"
        recipe = next((name for name in self.names if name.endswith(RECIPE_SUFFIXES)), None)
        if recipe:
            return f"--method goes with models, and '{recipe}' is a recipe; try --set merge_method={self.method}"
        if self.weights and len(self.weights) != len(self.names):
            return f"--weights: {len(self.weights)} given for {len(self.names)} models; give one for each"
        return None

    def load(self) -> Recipe:
        """The recipe, checked.

        Raises:
            RecipeError: everything that is wrong with it.
        """
        from mergekit_lowrank.recipe import load_recipe, parse_recipe

        if self.method is None:
            return load_recipe(self.names[0], self.overrides)
        recipe = {"merge_method": self.method, "models": [self._model(index) for index in range(len(self.names))]}
        return parse_recipe(recipe, self.overrides, name="command line")

    def _model(self, index: int) -> Mapping[str, object]:
        parameters = {"weight": self.weights[index]} if self.weights else {}
        return {"model": self.names[index], "parameters": parameters}
