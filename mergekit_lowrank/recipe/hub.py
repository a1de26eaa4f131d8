"""Checkpoints on the Hugging Face Hub: which files make one, and those files, each fetched once into the cache."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lowrank.errors import CheckpointError, RecipeError
from mergekit_lowrank.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS, SIDE_FILE

__all__ = [
    "Commit",
    "HubId",
    "Selection",
    "fetch",
    "hub_errors",
    "in_parallel",
    "keep",
    "kept",
    "network_errors",
    "not_cached",
    "select",
    "summary",
]

MAX_HUB_CHARACTERS = 96
"""Length of the longest ``org/name`` that the Hub allows (huggingface_hub, validate_repo_id)."""

_PREFIX = "hf:"
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_PATH = r"[^@/\\\0]+(?:/[^@/\\\0]+)*"
_HUB_ID = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:/(?P<path>{_PATH}))?(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII
)
_SHA = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yaml", ".yml", ".git")

TEXT_FILES = (
    "*.json",
    "*.txt",
    "*.md",
    "*.jinja",
    "*.py",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
"""What belongs to a checkpoint beside its tensors: configuration, tokenizer, code, card and licence."""

UNUSED_FILES = ("*.index.json", "trainer_state.json")
"""Among ``TEXT_FILES``, what is not fetched: indices of weights that were not chosen, and a log that may be long."""

LARGE_BYTES = 8 * 2**20

SHOWN_NAMES = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubId:
    """A repository on the Hugging Face Hub, a branch, tag or commit of it, and a directory or file in it."""

    repository: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id that ``text`` is; None when it is none.

        Args:
            text: ``org/name`` or ``org/name@revision``; with a path in the repository ``hf:org/name/path[@revision]``.
        """
        match = _HUB_ID.fullmatch(text.removeprefix(_PREFIX))
        if not match or ".." in text or (match["path"] and not text.startswith(_PREFIX)):
            return None
        repository = match["repository"]
        if len(repository) > MAX_HUB_CHARACTERS or "--" in repository or repository.endswith(_FILE_SUFFIXES):
            return None
        return cls(repository, match["revision"], match["path"] or "")

    def __str__(self) -> str:
        whole = f"{self.repository}/{self.path}" if self.path else self.repository
        return f"{whole}@{self.revision}" if self.revision else whole


def fetch(hub_id: HubId) -> Path:
    """The directory or file in the local cache that ``hub_id`` means; what of it is not there yet is fetched.

    A commit whose files are all in the cache is not asked for. A branch or tag is: where the Hub cannot be reached it
    is what the cache last knew.

    Raises:
        RecipeError: there is no such repository or revision.
        CheckpointError: it cannot be fetched, or holds no checkpoint, or several.
    """
    with hub_errors(hub_id):
        commit = Commit.of(hub_id)
        selection = select(commit, hub_id)
        paths = commit.fetch(selection.files)
        commit.remember()
        return selection.root(paths[0])


@dataclass(frozen=True)
class Commit:
    """One commit of a repository.

    Attributes:
        repository: as ``org/name``.
        revision: the branch, tag or commit that was asked for.
        sha: the commit that it is.
        sizes: the bytes of each file, by its path in the repository.
        is_local: whether the Hub could not be reached, so that only the cache is used.
    """

    repository: str
    revision: str
    sha: str
    sizes: Mapping[str, int]
    is_local: bool = False

    @classmethod
    def of(cls, hub_id: HubId) -> Commit:
        """The commit that ``hub_id`` means now: one request, or none where the commit itself is named and known."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub import errors as hub

        repository, revision = hub_id.repository, hub_id.revision or constants.DEFAULT_REVISION
        if _SHA.fullmatch(revision) and (sizes := kept(repository, revision, "listing")) is not None:
            return cls(repository, revision, revision, sizes)
        try:
            info = HfApi().model_info(
                repository,
                revision=hub_id.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
            raise
        except network_errors():
            cached = cls._cached(repository, revision)
            if cached is None:
                raise
            return cached
        sha = info.sha or revision
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        keep(repository, sha, "listing", sizes)
        return cls(repository, revision, sha, sizes)

    @classmethod
    def _cached(cls, repository: str, revision: str) -> Commit | None:
        """The commit as the cache last knew it.

        Source: the layout of the cache is documented, https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
        """
        storage = _storage(repository)
        ref = storage / "refs" / revision
        sha = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        snapshot = storage / "snapshots" / sha
        if not snapshot.is_dir():
            return None
        sizes = kept(repository, sha, "listing")
        if sizes is None:  # another program fetched it
            files = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
            sizes = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files}
        return cls(repository, revision, sha, sizes, is_local=True)

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Where the files lie in the cache, fetched if they do not: small ones together, large ones in turn.

        A download in another thread would not end with Ctrl-C, and huggingface_hub fetches the parts of a large file
        together by itself.

        Raises:
            CheckpointError: one is not there and the Hub cannot be reached.
        """
        small = [name for name in names if self.sizes.get(name, 0) <= LARGE_BYTES]
        found = dict(zip(small, in_parallel(self._fetch, small), strict=True))
        return [found.get(name) or self._fetch(name) for name in names]

    def cached(self, name: str) -> Path | None:
        """Where a file lies in the cache, if it does."""
        path = _storage(self.repository) / "snapshots" / self.sha / name
        return path if path.is_file() else None

    def remember(self) -> None:
        """Note in the cache what the revision is, for when the Hub cannot be reached. All files should be there."""
        if self.is_local or self.revision == self.sha:
            return
        _write(_storage(self.repository) / "refs" / self.revision, self.sha)

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(self.repository, name, revision=self.sha, local_files_only=self.is_local)
        except hub.LocalEntryNotFoundError as error:
            raise CheckpointError(not_cached(f"'{name}' of '{self.repository}@{self.revision}'")) from error
        return Path(path)


@dataclass(frozen=True)
class Selection:
    """The files of one checkpoint in a repository.

    Attributes:
        path: the directory, "" for the repository itself; or the file, where the checkpoint is one file.
        weights: the files that hold tensors.
        texts: the small files.
        is_directory: whether a configuration stands beside the weights. Without one the tensors alone say all.
    """

    path: str
    weights: tuple[str, ...]
    texts: tuple[str, ...]
    is_directory: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, the weights first."""
        return (*self.weights, *self.texts)

    def root(self, first: Path) -> Path:
        """What the checkpoint is opened by, where ``first`` is where the first of its files lies."""
        if not self.is_directory:
            return first
        below = self.files[0].removeprefix(f"{self.path}/" if self.path else "")
        return first.parents[below.count("/")]


def select(commit: Commit, hub_id: HubId) -> Selection:
    """Which files of a commit make the checkpoint that is meant: safetensors where there are any, else pickles.

    The index of a sharded checkpoint is fetched to know its shards.

    Raises:
        CheckpointError: there is no checkpoint, or several (named).
    """
    path = hub_id.path
    if path in commit.sizes:
        return Selection(path, (path,), _texts(commit, path.rpartition("/")[0]), is_directory=False)
    names = _names_in(commit, path)
    if ADAPTER_CONFIG in names:
        side = tuple(_joined(path, name) for name in (SIDE_FILE,) if name in names)
        return Selection(path, (*_weights(commit, path, ADAPTER_WEIGHTS), *side), _texts(commit, path))
    if MODEL_CONFIG in names and any(name in names for name in MODEL_WEIGHTS):
        return Selection(path, _weights(commit, path, MODEL_WEIGHTS), _texts(commit, path))
    single = [_joined(path, name) for name in names if name.endswith(".safetensors")]
    if len(single) == 1:
        return Selection(single[0], (single[0],), _texts(commit, path), is_directory=False)
    raise CheckpointError(_no_checkpoint(commit, hub_id, names, single))


def in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """The result for each item, in order, worked on by a few threads. The first failure ends it."""
    pool = ThreadPoolExecutor(max_workers=8)  # as huggingface_hub's snapshot_download
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def kept(repository: str, sha: str, name: str) -> Any:
    """What ``keep`` has kept about a commit; None where there is nothing, or nothing whole."""
    try:
        return json.loads((_assets(repository, sha) / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None


def keep(repository: str, sha: str, name: str, content: object) -> None:
    """Keep what is known of a commit as JSON, in huggingface_hub's cache for what libraries derive."""
    _write(_assets(repository, sha) / f"{name}.json", json.dumps(content))


@contextmanager
def hub_errors(hub_id: HubId) -> Iterator[None]:
    """Within it, what huggingface_hub raises becomes an error that says what is wrong with ``hub_id``.

    Raises:
        RecipeError: there is no such repository or revision.
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import errors as hub

    whole = f"'{hub_id}' on the Hugging Face Hub"
    try:
        yield
    except hub.GatedRepoError as error:
        raise CheckpointError(f"{whole} is gated: ask for access on its page, then run 'hf auth login'") from error
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
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise CheckpointError(not_cached("it")) from error  # who asked has named it
    except hub.SafetensorsParsingError as error:
        raise CheckpointError(f"{whole} is not valid safetensors: {summary(error)}") from error
    except network_errors() as error:
        raise CheckpointError(f"'{hub_id}' cannot be fetched from the Hugging Face Hub: {summary(error)}") from error


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for the network, and for an answer that is not the Hub's."""
    from huggingface_hub import errors as hub

    # The base of its HTTP errors is that of its HTTP client, which has changed twice.
    return (*hub.HfHubHTTPError.__bases__, OSError, json.JSONDecodeError)


def summary(error: Exception) -> str:
    """The first line of an error, and when to try again if it says so."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return "; ".join([first, *(line for line in others if line.startswith("Retry after"))])


def not_cached(what: str) -> str:
    """What is said of something that only the Hub has, where it cannot be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{what} is not in the local cache, and HF_HUB_OFFLINE keeps the Hugging Face Hub from being asked (unset "
            "that variable, or run 'hf download' first)"
        )
    return (
        f"the Hugging Face Hub cannot be reached, and {what} is not in the local cache (run 'hf download' where there "
        "is a network)"
    )


def _names_in(commit: Commit, directory: str) -> list[str]:
    """The files directly in a directory."""
    prefix = f"{directory}/" if directory else ""
    below = (path.removeprefix(prefix) for path in commit.sizes if path.startswith(prefix))
    return sorted(name for name in below if "/" not in name)


def _joined(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _texts(commit: Commit, directory: str) -> tuple[str, ...]:
    prefix = f"{directory}/" if directory else ""
    below = (path.removeprefix(prefix) for path in sorted(commit.sizes) if path.startswith(prefix))
    return tuple(f"{prefix}{name}" for name in below if _is_text(name))


def _is_text(name: str) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in UNUSED_FILES):
        return False
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in TEXT_FILES)


def _weights(commit: Commit, directory: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The first of ``candidates`` that is there; of an index the shards, then itself."""
    paths = (_joined(directory, name) for name in candidates)
    first = next((path for path in paths if path in commit.sizes), None)
    if first is None:
        return ()
    if not first.endswith(".index.json"):
        return (first,)
    (index,) = commit.fetch([first])
    shards = dict.fromkeys(_joined(directory, name) for name in _shards_of(index))
    return (*(shard for shard in shards if shard in commit.sizes), first)


def _shards_of(index: Path) -> list[str]:
    """The names in a ``weight_map``; none in an index that is broken, which its reader explains."""
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted({name for name in names if isinstance(name, str)})


def _no_checkpoint(commit: Commit, hub_id: HubId, names: Sequence[str], single: Sequence[str]) -> str:
    configs = (path for path in sorted(commit.sizes) if path.endswith(f"/{ADAPTER_CONFIG}"))
    prefix = f"{hub_id.path}/" if hub_id.path else ""
    nested = [path.rpartition("/")[0] for path in configs if path.startswith(prefix)]
    several = [*single, *nested]
    if several:
        choice = HubId(hub_id.repository, hub_id.revision, several[0])
        return f"'{hub_id}' holds {len(several)} checkpoints, {_listed(several)}: name one, as in '{_PREFIX}{choice}'"
    found = f"it has {_listed(names)}" if names else "no file lies there"
    return (
        f"'{hub_id}' on the Hugging Face Hub holds no checkpoint: {found}; expected {ADAPTER_CONFIG}, or "
        f"{MODEL_CONFIG} with weights, or a .safetensors file"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN_NAMES])
    return f"{shown} and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else shown


def _storage(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _assets(repository: str, sha: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "mergekit-lowrank" / repository.replace("/", "--") / sha


def _write(path: Path, text: str) -> None:
    """Write a file of a cache as a whole. A cache that cannot be written to is only slower."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
