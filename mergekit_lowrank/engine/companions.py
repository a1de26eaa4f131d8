"""What goes with the tensors of an output: the tokenizer and chat template of its sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_lowrank.engine.provenance import base_directory
from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.formats import Checkpoint, ModelDirectory
from mergekit_lowrank.formats.tokenizers import TokenizerSource, agreed_tokenizer, is_tokenizer_file
from mergekit_lowrank.recipe import Recipe

__all__ = ["planned_tokenizer", "with_tokenizer"]


def planned_tokenizer(
    recipe: Recipe, inputs: Sequence[Checkpoint], base: ModelDirectory | None = None
) -> dict[str, Path]:
    """The files of the tokenizer to write, by their path in the output; empty where there is none.

    The base's tokenizer has a say where the output is a model, which gets one in any case. An adapter gets the one that
    its inputs have, or the base's where the recipe asks for it.

    Args:
        recipe: of the merge.
        inputs: opened.
        base: the base model, where it is opened.

    Raises:
        IncompatibleInputsError: the tokenizers differ, and the recipe does not say which one to take.
        RecipeError: ``tokenizer_source`` names none of them, or is mergekit's ``union``.
        CheckpointError: the one it names has no tokenizer, or a file cannot be read.
    """
    chosen, sources = recipe.tokenizer_source, [TokenizerSource.of(checkpoint) for checkpoint in inputs]
    directory = base_directory(recipe, inputs, base)
    if directory is not None and (recipe.output.kind == "model" or chosen is not None):
        sources.insert(0, TokenizerSource("base", directory, recipe.base_model))
    try:
        return agreed_tokenizer(sources, chosen)
    except RecipeError as error:
        raise recipe.problem(("tokenizer_source",), str(error)) from None


def with_tokenizer(companions: Mapping[str, Path], tokenizer: Mapping[str, Path]) -> dict[str, Path]:
    """The small files of a base with another tokenizer in place of its own, by their path in the output."""
    return {name: path for name, path in companions.items() if not is_tokenizer_file(name)} | dict(tokenizer)
