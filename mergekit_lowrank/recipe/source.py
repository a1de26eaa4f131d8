"""From a file, text or mapping to a checked recipe that knows where each of its values stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.checking import checked, document_of
from mergekit_lowrank.recipe.document import Document, read_yaml
from mergekit_lowrank.recipe.models import Recipe
from mergekit_lowrank.recipe.origin import Origin, shown

__all__ = ["load_recipe", "parse_recipe"]

MAX_BYTES = 1 << 20
"""Size of the largest recipe file that is read."""


def load_recipe(source: str | PathLike[str] | Mapping[str, object] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``source`` (a path, a mapping or a recipe) gives once ``overrides`` are put over it.

    Args:
        source: a YAML file, the same as a mapping, or a recipe.
        overrides: each as ``parameters.density=0.5`` or ``models[0].parameters.weight=-1``, with a value in YAML.

    Raises:
        RecipeError: every problem that was found, each with its file, line and column.
    """
    if isinstance(source, Recipe):
        return checked(document_of(source), source._origin, overrides) if overrides else source
    if isinstance(source, Mapping):
        return parse_recipe(source, overrides)
    path = Path(source)
    return parse_recipe(_read(path), overrides, name=str(path), directory=path.absolute().parent)


def parse_recipe(
    source: str | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    name: str = "recipe",
    directory: Path | None = None,
) -> Recipe:
    """The recipe in YAML text or a mapping.

    Args:
        source: the text or mapping.
        overrides: as for ``load_recipe``.
        name: what errors call the recipe.
        directory: what relative paths in it start from; the working directory when left out.

    Raises:
        RecipeError: every problem that was found; for text with line and column.
    """
    origin = Origin(name, directory or Path.cwd())
    if isinstance(source, Mapping):
        return checked(Document(dict(source), {}), origin, overrides)
    document = read_yaml(source, locate=lambda line, column: f"{name}:{line + 1}:{column + 1}")
    if not isinstance(document.data, dict):
        found = "nothing" if document.data is None else shown(document.data)
        where = Origin(name, places=document.places).where(())
        raise RecipeError(f"{where}: expected a mapping with keys such as 'merge_method' and 'models', found {found}")
    return checked(document, origin, overrides)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; name the recipe file in it") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes, the most that is read as a recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from None
