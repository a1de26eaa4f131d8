"""``manifest.json``: what went in and came out, to the byte."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import PACKAGES, Plan
from mergekit_lowrank.errors import CheckpointError

__all__ = ["SCHEMA_VERSION", "Digests", "background_digests", "build_manifest", "sha256_of"]

SCHEMA_VERSION = 1
CHUNK_BYTES = 1 << 20
HASHED_AT_ONCE = 2

Digests: TypeAlias = Mapping[Path, str]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read once in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def background_digests(
    paths: Iterable[Path], *, enabled: bool = True, found: Callable[[Path, str], None] | None = None
) -> Iterator[Callable[[], Digests]]:
    """Hash files in one thread while the merge reads them; the function given waits for the result.

    Leaving the context early (an error) drops what has not begun.

    Args:
        paths: of the files.
        enabled: whether to hash any.
        found: told of each file's hash, in that thread.
    """
    pool = ThreadPoolExecutor(1, "hash")

    def hashed(path: Path) -> str:
        digest = sha256_of(path)
        if found is not None:
            found(path, digest)
        return digest

    futures: dict[Path, Future[str]] = {}
    if enabled:
        futures = {path: pool.submit(hashed, path) for path in dict.fromkeys(paths)}

    def collect() -> Digests:
        try:
            return {path: future.result() for path, future in futures.items()}
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read for its hash: {error.strerror}.") from error

    try:
        yield collect
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def build_manifest(
    plan: Plan, digests: Digests, outputs: Mapping[str, Path], tensors: Mapping[str, Mapping[str, str]]
) -> str:
    """The manifest as indented JSON.

    Args:
        plan: what was merged.
        digests: of the source files; empty under ``--no-hash``.
        outputs: files of the output by name; they are hashed here, two at a time, apart from those in ``tensors``.
        tensors: of the weights of a model, by file: xxh3_128 of each tensor as it was written. To read whole models
            again for another hash would take as long as to write them.
    """
    hashed = {name: path for name, path in outputs.items() if name not in tensors}
    with ThreadPoolExecutor(HASHED_AT_ONCE, "hash") as pool:
        written = dict(zip(hashed, pool.map(sha256_of, hashed.values()), strict=True))
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "mergekit_lowrank": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "seed": plan.recipe.seed,
        "sources": [
            {
                "label": checkpoint.label,
                "location": checkpoint.location,
                "base_model": checkpoint.base_model,
                "revision": checkpoint.revision,
                "files": [_file(path, digests.get(path)) for path in checkpoint.files],
            }
            for checkpoint in plan.inputs
        ],
        "base": _base(plan),
        "outputs": [
            {"name": name, "bytes": path.stat().st_size, "xxh3_128": dict(tensors[name])}
            if name in tensors
            else {**_file(path, written[name]), "name": name}
            for name, path in outputs.items()
        ],
    }
    return json.dumps(manifest, indent=1) + "\n"


def _base(plan: Plan) -> dict[str, Any] | None:
    """The base, where its weights were read, by sizes, times and headers: they are not hashed."""
    if plan.base is None:
        return None
    return {"location": plan.recipe.base_model, "fingerprint": plan.base.fingerprint}


def _file(path: Path, digest: str | None) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
