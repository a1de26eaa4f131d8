"""Stand-ins for checkpoints on the Hugging Face Hub that have all headers and no data, for a plan to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any
from urllib.parse import quote

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.filenames import OUTLINE_MARK
from mergekit_lowrank.recipe.hub import (
    Commit,
    HubId,
    Selection,
    hub_errors,
    in_parallel,
    keep,
    kept,
    not_cached,
    select,
)

__all__ = ["Outlines"]

_LENGTH_BYTES = 8  # little-endian, https://github.com/huggingface/safetensors#format


class Outlines:
    """Outlines of checkpoints on the Hub, in a temporary directory that is there while this is entered.

    An outline has the layout of its repository. Small files, pickles, and what the cache holds already are links to
    the cache. Any other safetensors file is its header, fetched by a range request, and a hole as long as the data:
    readers of headers take it for the real one. Headers are kept in the cache.

    A file with numbers that readers want when they open it, the ``alpha`` of kohya or the magnitudes of DoRA, is
    fetched whole.
    """

    def __init__(self) -> None:
        self._directory: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Outlines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    def __call__(self, hub_id: HubId) -> Path:
        """The outline of a checkpoint, as ``fetch`` gives the real one.

        Raises:
            RecipeError: there is no such repository or revision.
            CheckpointError: it cannot be read, or holds no checkpoint, or several.
        """
        with hub_errors(hub_id):
            commit = Commit.of(hub_id)
            selection = select(commit, hub_id)
            return selection.root(self._drawn(commit, selection))

    def _drawn(self, commit: Commit, selection: Selection) -> Path:
        """Where the first file of the outline lies."""
        if self._directory is None:
            self._directory = TemporaryDirectory(prefix="mergekit-lowrank-outlines-")
        root = Path(self._directory.name) / commit.repository / commit.sha
        lacking = [name for name in selection.weights if name.endswith(".safetensors") and commit.cached(name) is None]
        headers = zip(lacking, in_parallel(lambda name: _header(commit, name), lacking), strict=True)
        bare = {name: header for name, header in headers if not any(map(_is_read_at_once, header, header.values()))}
        whole = [name for name in selection.files if name not in bare]
        for name, path in zip(whole, commit.fetch(whole), strict=True):
            link = _within(root, name)
            if not link.is_symlink():
                link.symlink_to(path)
        for name, header in bare.items():
            _write_outline(_within(root, name), header)
        return root / selection.files[0]


def _is_read_at_once(key: str, entry: Mapping[str, Any]) -> bool:
    """Whether a tensor's data, not its header alone, is read when its file is opened."""
    return "lora_magnitude_vector" in key or (key.endswith(".alpha") and math.prod(entry["shape"]) == 1)


def _within(root: Path, name: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _header(commit: Commit, name: str) -> dict[str, Any]:
    """The header of a safetensors file, with the mark of an outline."""
    key = f"{quote(name, safe='')}.header"
    known: dict[str, Any] | None = kept(commit.repository, commit.sha, key)
    if known is not None:
        return known
    if commit.is_local:
        raise CheckpointError(not_cached(f"'{name}' of '{commit.repository}@{commit.revision}'"))
    header = _fetched_header(commit, name)
    keep(commit.repository, commit.sha, key, header)
    return header


def _fetched_header(commit: Commit, name: str) -> dict[str, Any]:
    from huggingface_hub import HfApi

    where, size_bytes = f"'{name}' of '{commit.repository}' on the Hugging Face Hub", commit.sizes[name]
    try:
        found = HfApi().parse_safetensors_file_metadata(commit.repository, name, revision=commit.sha)
        tensors = {
            key: {"dtype": info.dtype, "shape": [*map(int, info.shape)], "data_offsets": [*map(int, info.data_offsets)]}
            for key, info in found.tensors.items()
        }
        header = {"__metadata__": {**found.metadata, OUTLINE_MARK: "true"}, **tensors}
        end = _end_of_data(header)
        is_truncated = _LENGTH_BYTES + end >= size_bytes
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:  # JSON, but not of this form
        raise CheckpointError(f"{where} is not valid safetensors: {error}") from error
    if is_truncated:
        raise CheckpointError(f"{where} has {size_bytes} bytes, and its header promises {end} of data: it is truncated")
    return header


def _end_of_data(header: Mapping[str, Any]) -> int:
    return max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)


def _write_outline(path: Path, header: Mapping[str, Any]) -> None:
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(_LENGTH_BYTES + len(text) + _end_of_data(header))
