"""Pushing a finished output to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from mergekit_lowrank._version import __version__
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.recipe.hub import HubId, network_errors, summary

__all__ = ["check_push", "push"]

UNAUTHORISED = (401, 403)


def check_push(repository: str) -> None:
    """Find what would stop a push before there is anything to push. The Hub is not asked.

    Raises:
        OutputError: ``repository`` is not ``org/name``, nobody is logged in, or ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants, get_token

    if HubId.parse(repository) != HubId(repository):
        raise OutputError(f"'{repository}' cannot be pushed to; name a repository on the Hugging Face Hub, 'org/name'")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"nothing can be pushed to '{repository}' while HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise OutputError(f"nothing can be pushed to '{repository}' without a token: run 'hf auth login' first")


def push(directory: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload a finished output, and give the address of its page.

    Files of the same names are replaced; others in the repository stay. The directory stays as it is.

    Args:
        directory: what a merge, ``convert``, ``extract`` or ``resize`` has made.
        repository: ``org/name``, made if there is none.
        private: whether one that is made can be seen by its owners only. One that exists stays what it is.

    Raises:
        OutputError: there is no such directory, or it cannot be pushed; how to push it again is said.
    """
    from huggingface_hub import HfApi

    path, api = Path(directory), HfApi()
    if not path.is_dir():
        raise OutputError(f"{path}: is no directory, so there is nothing to push")
    check_push(repository)
    failures: tuple[type[Exception], ...] = (*network_errors(), RuntimeError, ValueError)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        message = f"Upload {path.name} with mergekit-lowrank {__version__}"
        api.upload_folder(repo_id=repository, folder_path=path, commit_message=message)
    except failures as error:
        again = shlex.join(["hf", "upload", repository, str(path), ".", *(["--private"] if private else [])])
        raise OutputError(
            f"{path} is complete, but was not pushed to '{repository}': {_reason(error)}. To push it again: {again}"
        ) from error
    return str(url)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = "; run 'hf auth login' with a token that may write there" if status in UNAUTHORISED else ""
    return f"{summary(error).rstrip('.')}{advice}"
