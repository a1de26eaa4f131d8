"""A model's name in a recipe to a directory or file on this machine: an existing path, else the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergekit_lowrank.errors import MergeError, RecipeError, nearest_name
from mergekit_lowrank.recipe.hub import HubId, fetch
from mergekit_lowrank.recipe.origin import shown

__all__ = ["resolve_directory", "resolve_model"]


def resolve_model(reference: str, directory: Path, *, download: Callable[[HubId], Path] | None = None) -> Path:
    """The path that ``reference`` means: an existing path wins, then ``org/name[@revision]`` on the Hub.

    Nothing is downloaded for what may be a misspelt path: when the first part of ``reference`` is a directory here, or
    nearly the name of one that has the rest. ``hf:org/name`` always means the Hub, and may go on with the path of a
    directory or file in the repository.

    Args:
        reference: as the recipe has it.
        directory: what relative paths start from.
        download: gives what lies on the Hub a path here; ``fetch`` when left out.

    Raises:
        RecipeError: there is no such path, and no such repository either.
        CheckpointError: the Hub has it, or may have it, but it cannot be fetched.
    """
    forced = reference.startswith("hf:")
    hub_id = HubId.parse(reference)
    if forced and hub_id is None:
        raise RecipeError(f"{shown(reference)}: after 'hf:' goes 'org/name', 'org/name@revision' or 'org/name/path'")
    path = _local_path(reference, directory)
    if not forced and _exists(path):
        return path
    if hub_id is None or (not forced and _is_misspelt(path, reference, directory)):
        raise RecipeError(_no_such_path(reference, path, directory, hub_id))
    try:
        return (download or fetch)(hub_id)
    except MergeError as error:
        not_here = "" if forced else f"; and there is no {path}"
        raise type(error)(f"{shown(reference)}: {error}{not_here}") from error


def resolve_directory(reference: str, directory: Path, *, download: Callable[[HubId], Path] | None = None) -> Path:
    """The directory that ``reference`` means, such as that of a base model; found as ``resolve_model`` does.

    Args:
        reference: as the recipe has it.
        directory: what relative paths start from.
        download: gives what lies on the Hub a path here; ``fetch`` when left out.

    Raises:
        RecipeError: there is none, or it is a file.
        CheckpointError: the Hub has it, or may have it, but it cannot be fetched.
    """
    path = resolve_model(reference, directory, download=download)
    if not path.is_dir():
        raise RecipeError(f"{shown(reference)}: {path} is a file; name the directory of the model")
    return path


def _local_path(reference: str, directory: Path) -> Path:
    try:
        return Path.absolute(directory / Path(reference).expanduser())
    except RuntimeError:  # "~name" of nobody
        return Path.absolute(directory / reference)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long or with a NUL, or a directory that may not be searched
        return False


def _nearest(path: Path) -> Path | None:
    """``path`` with its first missing part replaced by the nearest name that exists there."""
    existing = next((parent for parent in path.parents if _exists(parent)), None)
    if existing is None or not existing.is_dir():
        return None
    missing, *rest = path.relative_to(existing).parts
    try:
        nearest = nearest_name(missing, [entry.name for entry in existing.iterdir()])
    except OSError:
        return None
    return existing.joinpath(nearest, *rest) if nearest else None


def _did_you_mean(path: Path, directory: Path) -> str:
    nearest = _nearest(path)
    if nearest is None or not _exists(nearest):
        return ""
    try:
        return f" (did you mean '{nearest.relative_to(directory.absolute())}'?)"
    except ValueError:
        return f" (did you mean '{nearest}'?)"


def _is_misspelt(path: Path, reference: str, directory: Path) -> bool:
    """Whether ``reference``, which has the form of a Hub id, looks like a path with a slip in it."""
    nearest = _nearest(path)
    return _exists(directory / reference.partition("/")[0]) or (nearest is not None and _exists(nearest))


def _no_such_path(reference: str, path: Path, directory: Path, hub_id: HubId | None) -> str:
    here = f"{shown(reference)}: there is no {path}{_did_you_mean(path, directory)}"
    if hub_id:
        return f"{here}; it looks like a misspelt path, so the Hugging Face Hub was not asked ('hf:{hub_id}' asks it)"
    hint = ""
    if "+" in reference:
        hint = "; name the adapter alone in place of mergekit's 'base+adapter', and the base under 'base_model'"
    return f"{here}; and it is no Hugging Face id, which has the form 'org/name' or 'org/name@revision'{hint}"
