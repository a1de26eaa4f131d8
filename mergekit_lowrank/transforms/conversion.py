"""An adapter in another dialect: the same factors and scaling under other names, read back and compared."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.errors import CheckpointError, OutputError, RecipeError
from mergekit_lowrank.filenames import MODEL_CONFIG
from mergekit_lowrank.formats import MANIFEST_NAME, Checkpoint, WholeModel, Writer, new_directory, write_text
from mergekit_lowrank.formats.checked import read_object
from mergekit_lowrank.lowrank import LowRankUpdate, blocks_of_rows
from mergekit_lowrank.recipe import resolve_directory, resolve_model
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.manifest import sha256_of

__all__ = ["ConversionReport", "convert"]

SCALING_TOLERANCE = 2.0**-23
"""Relative: dialects that store alpha as a tensor round it to float32, once on the way out and once in α/r."""
BLOCK_ENTRIES = 1 << 20
"""Entries of an extra that are compared at once."""
SHOWN = 3
FACTS = ("base_model", "revision", "task_type", "fan_in_fan_out")
"""What an adapter says beside its tensors, and a dialect may have no place for."""


@dataclass(frozen=True)
class ConversionReport:
    """What came back when the result of a conversion was read.

    Attributes:
        source: as given.
        source_format: the format that opened it.
        output: the directory that was made.
        format: the writer's name.
        files: names of the files in ``output``.
        modules: how many there are.
        tensors: how many were compared, bit for bit, and found equal: two factors a module, and the extras.
        stored_bytes: of these tensors in the source.
        largest_scaling_change: relative, over the modules; above 0 only where the dialect rounds alpha.
        renamed: modules that the result calls otherwise, by their name in the source.
        not_kept: facts beside the tensors that the dialect has no place for, such as ``task_type``.
        is_read_back: whether a registered format reads what was written; if not, nothing was compared.
    """

    source: str
    source_format: str
    output: str
    format: str
    files: tuple[str, ...]
    modules: int
    tensors: int
    stored_bytes: int
    largest_scaling_change: float
    renamed: Mapping[str, str]
    not_kept: tuple[str, ...]
    is_read_back: bool

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "peft",  # noqa: A002 - as the recipe calls it
    registry: Registry | None = None,
    overwrite: bool = False,
    base: str | Path | None = None,
) -> ConversionReport:
    """Write an adapter in another dialect, read the result, and compare it with the source.

    No number changes: factors and extras keep their bits, and every module its scaling (α/r that a dialect stores in
    float32 may move by 2⁻²³). The directory appears only where all that holds.

    Args:
        source: a path or ``org/name[@revision]``, of any format that opens.
        output: the directory to make.
        format: the name of a writer: ``peft``, ``gguf``, or a plugin's such as ``kohya`` or ``diffusers``.
        registry: what reads and writes; by default the built-ins and every installed plugin.
        overwrite: whether what a conversion or merge left at ``output`` may be replaced.
        base: directory of the base model, whose ``config.json`` some dialects need (``gguf``); by default where the
            adapter says that its base is.

    Raises:
        CheckpointError: the source does not open, the dialect has no place for something in it, or what was read back
            differs; each offender is named, and nothing is left at ``output``.
        OutputError: ``output`` exists, or cannot be written.
        RecipeError: no such writer, or no such source.
    """
    registry, target = registry or Registry.load(), Path(output)
    writer = _writer(registry.writer(format), base)
    path = resolve_model(str(source), Path.cwd())
    checkpoint = open_checkpoint(path, registry, label=path.resolve().name)
    _check_source(checkpoint)
    _refuse_overlap(path, target)
    with new_directory(target, overwrite=overwrite) as partial:
        writer.write(checkpoint, partial)
        comparison = _read_back(checkpoint, partial, registry, format)
        report = ConversionReport(
            source=str(source),
            source_format=_format_of(path, registry),
            output=str(output),
            format=format,
            files=tuple(sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())),
            **comparison,
        )
        write_text(partial / MANIFEST_NAME, _manifest(checkpoint, partial, report))
    return report


def _format_of(path: Path, registry: Registry) -> str:
    """The name of the format that opens what lies at ``path``."""
    return next(name for name, cls in registry.formats.items() if cls().recognises(path))


def _writer(kind: type[Writer], base: str | Path | None) -> Writer:
    """The writer; one that takes an argument is given the base's configuration there."""
    if base is None:
        return kind()
    if not inspect.signature(kind).parameters:
        raise RecipeError(f"format '{kind.name}' needs no base model: leave the base out")
    config = resolve_directory(str(base), Path.cwd()) / MODEL_CONFIG
    return kind(read_object(config, where=f"base model '{base}'"))  # type: ignore[call-arg]


def _check_source(checkpoint: Checkpoint) -> None:
    if isinstance(checkpoint, WholeModel):
        raise CheckpointError(
            f"'{checkpoint.label}' is a whole model, and no dialect of adapters holds one. Make an adapter of what it "
            "changed in its base first: mergekit-lowrank extract."
        )
    if checkpoint.needs_base is not None:
        raise CheckpointError(
            f"'{checkpoint.label}' cannot be converted: {checkpoint.needs_base}. Make it a plain LoRA first: "
            "mergekit-lowrank resize --base."
        )


def _refuse_overlap(path: Path, output: Path) -> None:
    source, target = path.resolve(), output.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(f"the output {output} and the source ({source}) overlap; choose another directory")


def _read_back(checkpoint: Checkpoint, written: Path, registry: Registry, writer: str) -> dict[str, Any]:
    """The fields of the report that say how the result compares; of one that nothing reads, that it was not."""
    if not any(cls().recognises(written) for cls in registry.formats.values()):
        unread = {
            "tensors": 0,
            "largest_scaling_change": 0.0,
            "renamed": {},
            "not_kept": (),
            "is_read_back": False,
        }
        return {"modules": len(checkpoint.modules), "stored_bytes": 0, **unread}
    result = open_checkpoint(written, registry, label=f"{checkpoint.label} as {writer}")
    comparison = _Comparison(checkpoint, result)
    comparison.run()
    return comparison.fields()


class _Comparison:
    """A checkpoint and what another dialect makes of it, tensor by tensor.

    Args:
        source: what was converted.
        result: what was read back.
    """

    def __init__(self, source: Checkpoint, result: Checkpoint) -> None:
        self._source, self._result = source, result
        self._differences: dict[str, list[str]] = {}
        self._largest_change, self._tensors = 0.0, 0
        self._renamed: dict[str, str] = {}

    def run(self) -> None:
        """Compare all of it, one module at a time.

        Raises:
            CheckpointError: what differs, each kind with its first offenders.
        """
        own, other = self._source.modules, self._result.modules
        self._renamed = self._matched_by_content()
        for name in own:
            partner = name if name in other else self._renamed.get(name)
            if partner is None:
                self._note("modules that did not come back", name)
            else:
                self._compare_module(name, partner)
        for name in other.keys() - own.keys() - set(self._renamed.values()):
            self._note("modules that the source lacks", name)
        self._compare_extras()
        self._raise_differences()

    def fields(self) -> dict[str, Any]:
        """What the report says of the comparison."""
        extras = self._source.extras.values()
        extra_bytes = sum(extra.dtype.itemsize * _entries(extra.shape) for extra in extras)
        return {
            "modules": len(self._source.modules),
            "tensors": self._tensors + len(extras),
            "stored_bytes": sum(header.stored_bytes for header in self._source.modules.values()) + extra_bytes,
            "largest_scaling_change": self._largest_change,
            "renamed": self._renamed,
            "not_kept": tuple(self._facts_lost()),
            "is_read_back": True,
        }

    def _matched_by_content(self) -> dict[str, str]:
        """Modules whose name is lost, with the first module of the result that holds the same bits."""
        own = [name for name in self._source.modules if name not in self._result.modules]
        others: dict[bytes, list[str]] = {}
        for name in self._result.modules:
            if name not in self._source.modules:
                others.setdefault(_digest(self._result, name), []).append(name)
        found = ((name, others.get(_digest(self._source, name))) for name in own) if others else ()
        return {name: matches.pop(0) for name, matches in found if matches}

    def _compare_module(self, name: str, partner: str) -> None:
        before, after = self._source.modules[name], self._result.modules[partner]
        if before.layout != after.layout:
            self._note("modules of another kind", f"{name} ({before.layout}, now {after.layout})")
        elif not self._same_tensors(name, partner):
            self._note("tensors with other values", name)
        change = abs(after.scaling - before.scaling) / (abs(before.scaling) or 1.0)
        self._largest_change = max(self._largest_change, change)
        if change > SCALING_TOLERANCE:
            self._note("scalings that differ", f"{name} ({before.scaling:g}, now {after.scaling:g})")

    def _same_tensors(self, name: str, partner: str) -> bool:
        before, after = _tensors(self._source, name), _tensors(self._result, partner)
        self._tensors += len(before)
        return len(before) == len(after) and all(map(_same_bits, before, after))

    def _compare_extras(self) -> None:
        own, other = self._source.extras, self._result.extras
        for name, extra in own.items():
            partner = other.get(name)
            if partner is None:
                self._note("tensors beside the factors that did not come back", name)
            elif (extra.shape, extra.tokens) != (partner.shape, partner.tokens) or not self._same_extra(name):
                self._note("tensors beside the factors that differ", name)
        for name in other.keys() - own.keys():
            self._note("tensors beside the factors that the source lacks", name)

    def _same_extra(self, name: str) -> bool:
        shape = self._source.extras[name].shape
        rows = shape[0] if len(shape) > 1 else 1
        blocks = blocks_of_rows((rows, _entries(shape) // max(1, rows)), BLOCK_ENTRIES)
        pairs = ((self._source.read_extra(name, block), self._result.read_extra(name, block)) for block in blocks)
        return all(_same_bits(before, after) for before, after in pairs)

    def _facts_lost(self) -> Iterator[str]:
        for fact in FACTS:
            before, after = getattr(self._source, fact), getattr(self._result, fact)
            if before and before != after:
                yield f"{fact} ({before})"

    def _note(self, what: str, example: str) -> None:
        self._differences.setdefault(what, []).append(f"'{example}'")

    def _raise_differences(self) -> None:
        if self._differences:
            listed = (
                f"{what}: {', '.join(examples[:SHOWN])}"
                + (f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else "")
                for what, examples in self._differences.items()
            )
            raise CheckpointError(
                f"{self._result.label}: what was read back is not what was written, so nothing is kept: "
                f"{'; '.join(listed)}. The dialect cannot hold this adapter, or its writer or reader is wrong."
            )


def _tensors(checkpoint: Checkpoint, module: str) -> tuple[Tensor, ...]:
    """A and B as stored, or the one tensor of a module that has no factors."""
    update = checkpoint.read(module)
    return (update.a, update.b) if isinstance(update, LowRankUpdate) else (update.read(slice(None)),)


def _digest(checkpoint: Checkpoint, module: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(checkpoint, module):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(_bits(tensor).numpy().data)
    return digest.digest()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, in which minus zero is not zero."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _entries(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _manifest(checkpoint: Checkpoint, directory: Path, report: ConversionReport) -> str:
    """The manifest of a conversion: what went in and came out, to the byte. It marks the directory as ours."""
    manifest = {
        "schema_version": 1,
        "mergekit_lowrank": __version__,
        "sources": [
            {
                "label": checkpoint.label,
                "location": report.source,
                "base_model": checkpoint.base_model,
                "revision": checkpoint.revision,
                "files": [_file(path, path.name) for path in checkpoint.files],
            }
        ],
        "conversion": {**report.to_dict(), "renamed": dict(report.renamed)},
        "outputs": [_file(directory / name, name) for name in report.files],
    }
    return json.dumps(manifest, indent=1) + "\n"


def _file(path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
