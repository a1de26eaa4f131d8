"""What an output holds, beside what its report says: modules, ranks, types, finite values, norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import DTYPES, REPORT_NAME, Checkpoint, Extra, ModelDirectory, PeftWriter
from mergekit_lowrank.formats.checked import finite, read_object
from mergekit_lowrank.formats.layouts import LORA_BIAS, Whole
from mergekit_lowrank.formats.parameters import matrix_shape
from mergekit_lowrank.lowrank import LowRankUpdate, blocks_of_rows, norm
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.results import SCHEMA_VERSION
from mergekit_lowrank.verification.hashing import without_advice
from mergekit_lowrank.verification.results import Fault, FaultKind

__all__ = ["Contents", "Place", "Said", "read_contents"]

NORM_TOLERANCE = 1e-3
"""The report's norms are good to four digits: products in float32, of which up to three may cancel."""
BLOCK_ENTRIES = 1 << 20
"""Of a tensor without factors, read at once."""


class SaidModule(BaseModel):
    """One module, as far as it is compared with what was written."""

    model_config = ConfigDict(frozen=True)

    module: str
    rank: int | None
    written_rank: int | None
    input_norms: tuple[float, ...]
    merged_norm: float
    scale: float
    relative_error: float | None
    warnings: tuple[str, ...]


class SaidTotals(BaseModel):
    """Over all modules, as far as the index of a sweep has it too."""

    model_config = ConfigDict(frozen=True)

    merged_norm: float
    kept_energy: float


class Said(BaseModel):
    """What ``report.json`` says of an output."""

    model_config = ConfigDict(frozen=True)

    method: str
    kind: str
    format: str
    dtype: str
    rank: int | None
    totals: SaidTotals
    modules: tuple[SaidModule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_each_once(self) -> Said:
        counts = Counter(module.module for module in self.modules)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"'{twice[0]}' is there {counts[twice[0]]} times")
        return self

    @classmethod
    def read(cls, directory: Path) -> Said:
        """That of an output.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = directory / REPORT_NAME
        try:
            found = read_object(path, where=str(directory))
        except CheckpointError as error:
            raise CheckpointError(f"{without_advice(error)} Merge again.") from error
        version = found.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: has schema version {version!r}, and this version of mergekit-lowrank reads {SCHEMA_VERSION}. "
                "Merge again, or use the version that its manifest names."
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "modules"
            raise CheckpointError(
                f"{path}: is not the report of a merge: {where}: {error.errors()[0]['msg']}. Merge again."
            ) from error


@dataclass(frozen=True)
class Place:
    """Where a module lies in an opened adapter: a module, or an extra of which it may be one row."""

    name: str
    is_extra: bool = False
    row: int | None = None

    def rows(self, checkpoint: Checkpoint, where: slice) -> Tensor:
        """Rows of its matrix, if it has no factors.

        Raises:
            CheckpointError: they are not finite, or cannot be read.
        """
        if not self.is_extra:
            update = checkpoint.read(self.name)
            return update.rows(where)
        return checkpoint.read_extra(self.name, where if self.row is None else slice(self.row, self.row + 1))


@dataclass
class Contents:
    """What was found in an output.

    Attributes:
        adapter: it, opened; None of a model, and of a dialect that nothing reads.
        places: where the modules of the report lie in it.
        model: the same of a model; None of an adapter.
        modules: how many were read.
        faults: what is not as the report says.
        information: what is no fault.
    """

    adapter: Checkpoint | None = None
    places: dict[str, Place] = field(default_factory=dict)
    model: ModelDirectory | None = None
    modules: int = 0
    faults: list[Fault] = field(default_factory=list)
    information: list[str] = field(default_factory=list)

    def fault(self, kind: FaultKind, where: str, message: str) -> None:
        """Note one."""
        self.faults.append(Fault(kind=kind, where=where, message=message))


def read_contents(directory: Path, said: Said, registry: Registry, label: str) -> Contents:
    """All of an output, read once, a module at a time.

    Args:
        directory: where it lies.
        said: its report.
        registry: its formats open it.
        label: what messages call it.
    """
    found = Contents()
    try:
        if said.kind == "model":
            found.model = ModelDirectory(directory, where=f"model '{label}'")
            _check_model(found, found.model, said)
        elif _is_read(directory, said.format, registry):
            found.adapter = open_checkpoint(directory, registry, label=label)
            _check_adapter(found, found.adapter, said)
        else:
            found.information.append(
                f"{said.format} files are written here and not read: what was checked of them is their hashes alone"
            )
    except CheckpointError as error:
        found.fault("structure", label, f"does not open: {without_advice(error)}")
    return found


def _is_read(directory: Path, dialect: str, registry: Registry) -> bool:
    return dialect in registry.formats or any(cls().recognises(directory) for cls in registry.formats.values())


def _check_adapter(found: Contents, adapter: Checkpoint, said: Said) -> None:
    found.places = _places(adapter, said)
    dtype = next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{said.dtype}"), None)
    for module in said.modules:
        place = found.places.get(module.module)
        if place is None:
            found.fault("structure", module.module, "is in the report and not in the output. Merge again.")
            continue
        try:
            _check_module(found, adapter, module, place, dtype)
            found.modules += 1
        except CheckpointError as error:
            found.fault("values", module.module, f"{without_advice(error)} Merge again.")
    for name in _strangers(adapter, found.places):
        found.fault("structure", name, "is in the output and not in the report. Merge again.")


def _check_module(
    found: Contents, adapter: Checkpoint, said: SaidModule, place: Place, dtype: torch.dtype | None
) -> None:
    if place.is_extra or said.written_rank is None:
        for _ in _blocks(adapter, place):
            pass
        return
    header = adapter.modules[place.name]
    if header.rank != said.written_rank:
        message = f"has rank {header.rank}; the report says {said.written_rank}. Merge again."
        found.fault("structure", said.module, message)
    if header.dtype != dtype:
        message = f"is stored as {header.dtype}; the report says torch.{dtype}. Merge again.".replace("torch.", "")
        found.fault("structure", said.module, message)
    update = adapter.read(place.name)
    if isinstance(update, LowRankUpdate):
        _check_norm(found, said, norm(update))


def _check_norm(found: Contents, said: SaidModule, size: float) -> None:
    is_explained = bool(said.warnings) or not said.scale or not any(said.input_norms)
    if size == 0 and (said.merged_norm or not is_explained):
        message = f"is zero; the report says that an update of norm {said.merged_norm:.4g} was merged. Merge again."
        found.fault("zero", said.module, message)
    elif not abs(size - said.merged_norm) <= NORM_TOLERANCE * said.merged_norm:  # of NaN too
        found.fault(
            "scaling",
            said.module,
            f"its scaling times B·A has the norm {size:.4g}; the report says that {said.merged_norm:.4g} was merged. "
            "Factors, alpha or ranks were changed: merge again.",
        )


def _blocks(adapter: Checkpoint, place: Place) -> Iterator[Tensor]:
    """All of a module without factors, finite."""
    if not place.is_extra:
        yield place.rows(adapter, slice(None))
        return
    shape = (1, 1) if place.row is not None else matrix_shape(adapter.extras[place.name].shape)
    yield from (place.rows(adapter, where) for where in blocks_of_rows(shape, BLOCK_ENTRIES))


def _places(adapter: Checkpoint, said: Said) -> dict[str, Place]:
    """Where each module of the report lies; those that other dialects than PEFT's rename are known by rank and norm."""
    known = {name: Place(name) for name in adapter.modules}
    for extra in adapter.extras.values():
        known |= {name: place for name, place in _places_of(extra) if name not in known}
    found = {module.module: known[module.module] for module in said.modules if module.module in known}
    taken = {place.name for place in found.values()}
    factored = [module for module in said.modules if module.written_rank is not None]
    lost = [own for own in factored if own.module not in known and said.format != PeftWriter.name]
    free = {name: norm(adapter.read(name)) for name in adapter.modules if name not in taken} if lost else {}
    for module in lost:
        alike = [name for name in free if adapter.modules[name].rank == module.written_rank]
        nearest = min(alike, key=lambda name: abs(free[name] - module.merged_norm), default=None)
        if nearest and abs(free[nearest] - module.merged_norm) <= NORM_TOLERANCE * module.merged_norm:
            found[module.module] = Place(nearest)
            del free[nearest]
    return found


def _places_of(extra: Extra) -> Iterator[tuple[str, Place]]:
    """The names that a merge has for a tensor beside the factors, or for its rows."""
    owner = extra.name.removesuffix(".weight")
    if extra.tokens is not None:
        yield from ((f"{owner}[{token}]", Place(extra.name, True, row)) for row, token in enumerate(extra.tokens))
        return
    yield extra.name, Place(extra.name, is_extra=True)
    yield owner, Place(extra.name, is_extra=True)


def _strangers(adapter: Checkpoint, places: Mapping[str, Place]) -> Iterator[str]:
    """Modules and tensors that the report does not name; biases of lora_B are filled up with zeros."""
    taken = {place.name for place in places.values()}
    for name, header in adapter.modules.items():
        is_bias = isinstance(header.layout, Whole) and header.layout.key.endswith(LORA_BIAS)
        if name not in taken and not (is_bias and not bool(adapter.read(name).rows(slice(None)).any())):
            yield name
    yield from (name for name in adapter.extras if name not in taken)


def _check_model(found: Contents, model: ModelDirectory, said: Said) -> None:
    names = [module.module for module in said.modules]
    for module, key in model.keys_for(names).items():
        spec = model.source.specs[key]
        for where in blocks_of_rows(matrix_shape(spec.shape), BLOCK_ENTRIES):
            try:
                finite(model.read_rows(key, where), key, where=model.where)
            except CheckpointError as error:  # noqa: PERF203 - every module's problem is wanted
                found.fault("values", module, f"{without_advice(error)} Merge again.")
                break
        found.modules += 1
