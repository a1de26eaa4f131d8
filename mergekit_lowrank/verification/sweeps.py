"""``sweep.json`` beside the variants that it lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import INDEX_NAME, WORK_DIRECTORY
from mergekit_lowrank.formats.checked import read_object
from mergekit_lowrank.verification.contents import Said
from mergekit_lowrank.verification.hashing import without_advice
from mergekit_lowrank.verification.results import Fault

__all__ = ["IndexedVariant", "beside_variants", "faults_of_variant", "read_index"]


class IndexedVariant(BaseModel):
    """One variant, as the index has it."""

    model_config = ConfigDict(frozen=True)

    name: str
    method: str
    rank: int | None
    merged_norm: float
    kept_energy: float

    @field_validator("name")
    @classmethod
    def _is_one_name(cls, name: str) -> str:
        if not name or name == ".." or PurePath(name).name != name:
            raise ValueError(f"{name!r} is not the name of a directory in the output")
        return name


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True)

    variants: tuple[IndexedVariant, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _names_each_once(cls, variants: tuple[IndexedVariant, ...]) -> tuple[IndexedVariant, ...]:
        names = [variant.name for variant in variants]
        if len(names) > len(set(names)):
            raise ValueError("a variant is listed twice")
        return variants


def read_index(directory: Path) -> tuple[IndexedVariant, ...]:
    """The variants of a sweep, at least one.

    Raises:
        CheckpointError: the index is damaged, or names something else than directories beside it.
    """
    path = directory / INDEX_NAME
    try:
        return _Index.model_validate(read_object(path, where=str(directory))).variants
    except CheckpointError as error:
        raise CheckpointError(f"{without_advice(error)} Merge again.") from error
    except ValidationError as error:
        where, message = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise CheckpointError(f"{path}: does not list variants: {where}: {message}. Merge again.") from error


def faults_of_variant(variant: IndexedVariant, directory: Path) -> Iterator[Fault]:
    """Whether a directory holds the variant that the index says, by the totals of its report."""
    try:
        said = Said.read(directory)
    except CheckpointError:  # which is a fault of the variant already
        return
    own = {"method": said.method, "rank": said.rank, **said.totals.model_dump()}
    for name, value in own.items():
        indexed = getattr(variant, name)
        if value != indexed:
            message = (
                f"its report has {name} {value}; {INDEX_NAME} says {indexed}: it holds another merge. Merge again."
            )
            yield Fault(kind="structure", where=variant.name, message=message)
            return


def beside_variants(directory: Path, index: Sequence[IndexedVariant]) -> Iterator[str]:
    """What lies in a sweep that the index does not name."""
    known = {INDEX_NAME, WORK_DIRECTORY, *(variant.name for variant in index)}
    beside = sorted(entry.name for entry in directory.iterdir() if entry.name not in known)
    if beside:
        yield f"beside the variants of {INDEX_NAME} lies {', '.join(map(repr, beside))}"
