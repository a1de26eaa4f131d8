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
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import PACKAGES, Plan
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import MANIFEST_NAME, Checkpoint

__all__ = [
    "SCHEMA_VERSION",
    "BaseFiles",
    "Digests",
    "Manifest",
    "OutputFile",
    "Source",
    "SourceFile",
    "background_digests",
    "build_manifest",
    "sha256_of",
]

SCHEMA_VERSION = 1
CHUNK_BYTES = 1 << 20
HASHED_AT_ONCE = 2
_MAKER = "mergekit_lowrank"

Digests: TypeAlias = Mapping[Path, str]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class SourceFile(_Frozen):
    """One file of an input."""

    name: str = Field(description="without its directory")
    bytes: int = Field(description="its size")
    sha256: str | None = Field(description="null where the merge was told not to hash (`--no-hash`)")


class Source(_Frozen):
    """One input."""

    label: str = Field(description="what messages call it")
    location: str = Field(description="as the recipe gave it")
    base_model: str | None = Field(description="the base its configuration names")
    revision: str | None = Field(description="of that base")
    files: tuple[SourceFile, ...] = Field(description="all that it consists of; none of an adapter in memory")


class BaseFiles(_Frozen):
    """The base model, where its weights were read. They are not hashed."""

    location: str | None = Field(description="as the recipe gave it")
    fingerprint: str = Field(description="SHA-256 of the sizes, times and headers of its files")


class OutputFile(_Frozen):
    """One file of the output."""

    name: str = Field(description="its path in the output")
    bytes: int = Field(description="its size")
    sha256: str | None = Field(None, description="of the file")
    xxh3_128: Mapping[str, str] | None = Field(
        None, description="of each tensor, in the place of `sha256` in the weights of a model"
    )


class Manifest(_Frozen):
    """What went into a merge and came out of it, to the byte."""

    schema_version: int = Field(description="of this file; a higher one may lack or rename fields")
    mergekit_lowrank: str = Field(description="the version of this package")
    python: str = Field(description="its version")
    packages: Mapping[str, str] = Field(description="versions of what decides the bytes of a result")
    machine: str = Field(description="the kind of processor")
    seed: int = Field(description="of the recipe")
    sources: tuple[Source, ...] = Field(description="one for each input")
    base: BaseFiles | None = Field(description="null where the base was not read")
    outputs: tuple[OutputFile, ...] = Field(
        description="every file of the output but the manifest, `timings.json` and `report.html`"
    )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a finished output.

        Raises:
            CheckpointError: there is none, it is damaged, or it is not that of a merge.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(f"{directory}: has no {MANIFEST_NAME}; expected what a merge has made.")
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}. Merge again.") from error
        if isinstance(found, dict) and "conversion" in found:
            raise CheckpointError(f"{directory}: was made by convert; expected what merge, resize or extract has made.")
        version, maker = (found.get(key) if isinstance(found, dict) else None for key in ("schema_version", _MAKER))
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: has schema version {version}, and this version of mergekit-lowrank reads up to "
                f"{SCHEMA_VERSION}. Use the version that made it."
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
            raise CheckpointError(
                f"{path}: is not the manifest of a merge: {where}: {error.errors()[0]['msg']} (schema version "
                f"{version!r} of mergekit-lowrank {maker!r}; this is {__version__}, which reads {SCHEMA_VERSION}). Use "
                "the version that made it, or merge again."
            ) from error


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
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        mergekit_lowrank=__version__,
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        machine=platform.machine(),
        seed=plan.recipe.seed,
        sources=tuple(_source(checkpoint, digests) for checkpoint in plan.inputs),
        base=_base(plan),
        outputs=tuple(
            OutputFile(name=name, bytes=path.stat().st_size, xxh3_128=dict(tensors[name]))
            if name in tensors
            else OutputFile(name=name, bytes=path.stat().st_size, sha256=written[name])
            for name, path in outputs.items()
        ),
    )
    return json.dumps(manifest.model_dump(mode="json", exclude_unset=True), indent=1) + "\n"


def _source(checkpoint: Checkpoint, digests: Digests) -> Source:
    return Source(
        label=checkpoint.label,
        location=checkpoint.location,
        base_model=checkpoint.base_model,
        revision=checkpoint.revision,
        files=tuple(
            SourceFile(name=path.name, bytes=path.stat().st_size, sha256=digests.get(path)) for path in checkpoint.files
        ),
    )


def _base(plan: Plan) -> BaseFiles | None:
    """The base, where its weights were read, by sizes, times and headers: they are not hashed."""
    if plan.base is None:
        return None
    return BaseFiles(location=plan.recipe.base_model, fingerprint=plan.base.fingerprint)
