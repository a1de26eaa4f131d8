"""A model's name in a recipe to a directory or file on this machine: an existing path, else the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank.errors import CheckpointError, MergeError, RecipeError, nearest_name
from mergekit_lowrank.recipe.origin import shown

__all__ = ["HubId", "resolve_directory", "resolve_model"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model*", "README.md")
"""What is fetched of a repository: all that one adapter consists of, and its licence."""

MAX_HUB_CHARACTERS = 96
"""Length of the longest ``org/name`` that the Hub allows (huggingface_hub, validate_repo_id)."""

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yaml", ".yml", ".git")


@dataclass(frozen=True)
class HubId:
    """A repository on the Hugging Face Hub, and a branch, tag or commit of it."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id that ``text`` is, as ``org/name`` or ``org/name@revision``; None when it is none."""
        match = _HUB_ID.fullmatch(text)
        if not match or ".." in text:
            return None
        repository = match["repository"]
        if len(repository) > MAX_HUB_CHARACTERS or "--" in repository or repository.endswith(_FILE_SUFFIXES):
            return None
        return cls(repository, match["revision"])

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def resolve_model(reference: str, directory: Path, *, download: Callable[..., str] | None = None) -> Path:
    """The path that ``reference`` means: an existing path wins, then ``org/name[@revision]`` on the Hub.

    Nothing is downloaded for what may be a misspelt path: when the first part of ``reference`` is a directory here, or
    nearly the name of one that has the rest. ``hf:org/name`` always means the Hub.

    Args:
        reference: as the recipe has it.
        directory: what relative paths start from.
        download: fetches a repository and returns its directory; ``huggingface_hub.snapshot_download`` when left out.

    Raises:
        RecipeError: there is no such path, and no such repository either.
        CheckpointError: the Hub has it, or may have it, but it cannot be fetched.
    """
    forced = reference.startswith("hf:")
    hub_id = HubId.parse(reference.removeprefix("hf:"))
    if forced and hub_id is None:
        raise RecipeError(f"{shown(reference)}: after 'hf:' goes 'org/name' or 'org/name@revision'")
    path = _local_path(reference, directory)
    if not forced and _exists(path):
        return path
    if hub_id is None or (not forced and _is_misspelt(path, reference, directory)):
        raise RecipeError(_no_such_path(reference, path, directory, hub_id))
    try:
        return _fetch(hub_id, download)
    except MergeError as error:
        not_here = "" if forced else f"; and there is no {path}"
        raise type(error)(f"{shown(reference)}: {error}{not_here}") from error


def resolve_directory(reference: str, directory: Path) -> Path:
    """The existing directory that ``reference`` means, such as that of a base model; nothing is downloaded.

    Args:
        reference: as the recipe has it.
        directory: what relative paths start from.

    Raises:
        RecipeError: there is none.
    """
    path = _local_path(reference, directory)
    if _exists(path):
        if not path.is_dir():
            raise RecipeError(f"{shown(reference)}: {path} is a file; name the directory of the model")
        return path
    hub_id = HubId.parse(reference.removeprefix("hf:"))
    fetch = ""
    if hub_id:
        command = f"hf download {hub_id.repository} --local-dir DIRECTORY"
        fetch = f"; a whole model is not fetched for you: run '{command}' and write that directory"
    raise RecipeError(f"{shown(reference)}: there is no {path}{_did_you_mean(path, directory)}{fetch}")


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


def _fetch(hub_id: HubId, download: Callable[..., str] | None) -> Path:
    """The directory that holds the files of ``hub_id``, fetched when they are not in the cache."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    if download is None:
        download = huggingface_hub.snapshot_download
    # The base of its HTTP errors is that of its HTTP client, which has changed twice.
    unreachable: tuple[type[Exception], ...] = (*hub.HfHubHTTPError.__bases__, OSError)
    try:
        return Path(download(repo_id=hub_id.repository, revision=hub_id.revision, allow_patterns=list(ADAPTER_FILES)))
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"'{hub_id}' on the Hugging Face Hub is gated: ask for access on its page, then run 'hf auth login'"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise RecipeError(
            f"'{hub_id.repository}' on the Hugging Face Hub has no revision '{hub_id.revision}'"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise RecipeError(
            f"the Hugging Face Hub has no repository '{hub_id.repository}' (a private one needs 'hf auth login')"
        ) from error
    except hub.HFValidationError as error:
        raise RecipeError(f"'{hub_id}' is not an id of the Hugging Face Hub: {error}") from error
    except hub.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"the Hugging Face Hub cannot be reached, and '{hub_id}' is not in the local cache"
        ) from error
    except unreachable as error:
        summary = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"'{hub_id}' cannot be fetched from the Hugging Face Hub: {summary}") from error
