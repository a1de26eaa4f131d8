"""Files as the manifest tells of them: those of the output, and those of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

from xxhash import xxh3_128

from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.errors import CheckpointError, MergeError
from mergekit_lowrank.formats import MANIFEST_NAME, PAGE_NAME, TIMINGS_NAME, WORK_DIRECTORY, TensorSource, open_tensors
from mergekit_lowrank.formats.checked import read_object
from mergekit_lowrank.formats.stream import bytes_of
from mergekit_lowrank.recipe import HubId, ModelEntry, Recipe, resolve_model
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.manifest import Manifest, OutputFile, Source, sha256_of
from mergekit_lowrank.verification.results import Fault, FaultKind

__all__ = [
    "RECIPE_NAME",
    "Hashed",
    "check_outputs",
    "check_sources",
    "refuse_devices",
    "require_local",
    "without_advice",
]

RECIPE_NAME = "recipe.yaml"
HASHED_AT_ONCE = 2
CHUNK_BYTES = 1 << 20
"""Of a tensor, read and hashed at once."""
UNLISTED = (MANIFEST_NAME, TIMINGS_NAME, PAGE_NAME)
"""What a merge writes and the manifest does not list."""
WEIGHTS = (".safetensors", ".bin", ".gguf")
"""What programs load from a directory without a list of what belongs to it."""
ADVICE = (" Download it again.", " A merge would spread them: train or save the adapter again.")
"""What readers of inputs say of a damaged one."""
SHOWN = 3


@dataclass(frozen=True)
class Hashed:
    """What came of comparing files with the manifest.

    Attributes:
        count: of the files whose hash was compared.
        faults: of those that are not what they were.
        information: what is no fault.
        are_all_there: whether every one was found.
    """

    count: int
    faults: tuple[Fault, ...]
    information: tuple[str, ...] = ()
    are_all_there: bool = True


def check_outputs(directory: Path, manifest: Manifest) -> Hashed:
    """Every file of an output, beside what the manifest says it is."""
    with ThreadPoolExecutor(HASHED_AT_ONCE, "hash") as pool:
        found = list(pool.map(lambda file: [*_of_output(directory, file)], manifest.outputs))
    listed = {PurePath(file.name).as_posix() for file in manifest.outputs}
    strange = [name for name in _names_in(directory) if name not in listed and name not in UNLISTED]
    beside = [name for name in strange if not name.endswith(WEIGHTS)]
    told = [f"beside the files of the merge lies {_listed(beside)}"] if beside else []
    faults = [fault for own in found for fault in own] + [*_of_strange_weights(set(strange).difference(beside))]
    compared = [file for file in manifest.outputs if _has_hash(file) and not _is_outside(file)]
    count = sum((directory / file.name).is_file() for file in compared)
    return Hashed(count, tuple(faults), tuple(told))


def _has_hash(file: OutputFile) -> bool:
    return file.sha256 is not None or file.xxh3_128 is not None


def _is_outside(file: OutputFile) -> bool:
    name = PurePath(file.name)
    return name.is_absolute() or ".." in name.parts


def _of_strange_weights(names: Iterable[str]) -> Iterator[Fault]:
    message = f"holds weights, and is not in {MANIFEST_NAME}: nothing proves them. Take it away, or merge again."
    yield from (Fault(kind="output", where=name, message=message) for name in sorted(names))


def _names_in(directory: Path) -> list[str]:
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if path.parts[0] != WORK_DIRECTORY]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def _of_output(directory: Path, file: OutputFile) -> Iterator[Fault]:
    path = directory / file.name
    if _is_outside(file):
        message = f"lies outside of the output, where no merge writes: {MANIFEST_NAME} was changed. Merge again."
        yield Fault(kind="output", where=file.name, message=message)
        return
    if not _has_hash(file):
        message = f"has no hash in {MANIFEST_NAME}, where every file of an output has one. Merge again."
        yield Fault(kind="output", where=file.name, message=message)
    try:
        if file.xxh3_128 is not None and path.is_file():
            yield from _of_tensors(path, file.name, file.xxh3_128)
        yield from _of_file(path, file.name, file.bytes, file.sha256, "output", "Merge again.")
        if path.suffix == ".json" and path.is_file():
            read_object(path, where=file.name)
    except (CheckpointError, OSError) as error:
        yield Fault(kind="output", where=file.name, message=f"cannot be read: {without_advice(error)} Merge again.")


def _of_file(path: Path, name: str, size: int, sha256: str | None, kind: FaultKind, advice: str) -> Iterator[Fault]:
    if not path.is_file():
        yield Fault(kind=kind, where=name, message=f"is missing; the manifest has {size:,} bytes. {advice}")
    elif (found := path.stat().st_size) != size:
        yield Fault(kind=kind, where=name, message=f"has {found:,} bytes; the manifest has {size:,}. {advice}")
    elif sha256 is not None and (digest := sha256_of(path)) != sha256:
        message = f"has the SHA-256 {digest[:16]}…; the manifest has {sha256[:16]}…: its content changed. {advice}"
        yield Fault(kind=kind, where=name, message=message)


def _of_tensors(path: Path, name: str, digests: Mapping[str, str]) -> Iterator[Fault]:
    source = open_tensors(path)
    if source.specs.keys() != digests.keys():
        lacking, more = digests.keys() - source.specs.keys(), source.specs.keys() - digests.keys()
        found = "; ".join(
            f"{what} {_listed(sorted(keys))}" for what, keys in (("lacks", lacking), ("adds", more)) if keys
        )
        yield Fault(kind="output", where=name, message=f"{found}; expected the tensors of the manifest. Merge again.")
    for key in (key for key in source.specs if key in digests):
        if _digest(source, key) != digests[key]:
            message = f"tensor '{key}' has other bytes than the manifest tells of: its content changed. Merge again."
            yield Fault(kind="output", where=name, message=message)


def _digest(source: TensorSource, key: str) -> str:
    spec, hashed = source.specs[key], xxh3_128()
    if not spec.shape:
        hashed.update(bytes_of(source.read(key)))
        return hashed.hexdigest()
    rows = max(1, CHUNK_BYTES * spec.shape[0] // max(1, spec.stored_bytes))
    for first in range(0, spec.shape[0], rows):
        hashed.update(bytes_of(source.read_rows(key, slice(first, first + rows))))
    return hashed.hexdigest()


def check_sources(manifest: Manifest, recipe: Recipe, registry: Registry, *, must_exist: bool) -> Hashed:
    """Every file of the inputs, beside what the manifest says it was.

    Args:
        manifest: of the output.
        recipe: of the output, whose paths start there.
        registry: its formats open the inputs.
        must_exist: whether an input that is not there is a fault, and what lies on the Hugging Face Hub is fetched.
    """
    if len(recipe.models) != len(manifest.sources):
        message = f"has {len(recipe.models)} models; the manifest has {len(manifest.sources)}. Merge again."
        return Hashed(0, (Fault(kind="recipe", where=RECIPE_NAME, message=message),), are_all_there=False)

    def check(entry: ModelEntry, source: Source) -> Hashed:
        if not source.files:
            return Hashed(
                0, (), (f"input '{source.label}' was in memory: nothing is left of it to compare, or to merge again",)
            )
        try:
            require_local(str(entry.model), recipe.directory)
            path = resolve_model(str(entry.model), recipe.directory, download=None if must_exist else _stay_here)
            refuse_devices(path)
            files = open_checkpoint(path, registry, label=source.label).files
        except MergeError as error:
            if must_exist:
                what = str(error).rstrip(".")
                message = f"cannot be opened: {what}. Put it back, or verify the output alone (--no-recompute)."
                return Hashed(0, (Fault(kind="source", where=source.label, message=message),), are_all_there=False)
            return Hashed(0, (), (f"input '{source.label}' was not checked: {error}",), are_all_there=False)
        return _of_source(files, source)

    with ThreadPoolExecutor(HASHED_AT_ONCE, "hash") as pool:
        found = list(pool.map(check, recipe.models, manifest.sources))
    return Hashed(
        sum(own.count for own in found),
        tuple(fault for own in found for fault in own.faults),
        tuple(said for own in found for said in own.information),
        all(own.are_all_there for own in found),
    )


def _stay_here(hub_id: HubId) -> Path:
    raise CheckpointError(f"{hub_id} is on the Hugging Face Hub, and is fetched only to be merged again")


def require_local(reference: str, directory: Path) -> None:
    """Raise a ``CheckpointError`` where a path of an output's recipe that cannot be a name on the Hub leads nowhere."""
    path = (directory / reference).resolve()
    if (reference.startswith("..") or Path(reference).is_absolute()) and not path.exists():
        raise CheckpointError(
            f"there is no {path} ('{reference}' in {RECIPE_NAME}). Paths in {RECIPE_NAME} start from the output; it or "
            "the inputs were moved"
        )


def refuse_devices(path: Path) -> None:
    """Raise a ``CheckpointError`` where a path, or what lies in it, is neither file nor directory: pipes never end."""
    for entry in sorted(path.iterdir()) if path.is_dir() else [path]:
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise CheckpointError(f"{entry}: is neither a file nor a directory, and is not read. Take it away.")


def without_advice(error: Exception) -> str:
    """What a reader says of a file, without what it says of inputs alone."""
    text = str(error)
    for advice in ADVICE:
        text = text.removesuffix(advice)
    return text


def _of_source(files: Sequence[Path], source: Source) -> Hashed:
    names = [path.name for path in files]
    wanted = [file.name for file in source.files]
    if names != wanted:
        message = f"consists of {_listed(names)}; it was merged from {_listed(wanted)}. Put these back."
        return Hashed(0, (Fault(kind="source", where=source.label, message=message),), (*_without_hash(source),))
    advice = "Put the file back that was merged, or merge again."
    faults = [
        fault
        for path, file in zip(files, source.files, strict=True)
        for fault in _of_file(path, f"{source.label}: {file.name}", file.bytes, file.sha256, "source", advice)
    ]
    hashed = sum(file.sha256 is not None for file in source.files)
    return Hashed(hashed, tuple(faults), (*_without_hash(source),))


def _without_hash(source: Source) -> Iterator[str]:
    if any(file.sha256 is None for file in source.files):
        yield f"input '{source.label}' was merged with --no-hash: of its files the manifest has names and sizes only"
