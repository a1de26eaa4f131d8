"""What a dialect has no place for, kept in the header of the file: a conversion there and back changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from mergekit_lowrank import CheckpointError

__all__ = ["Origin"]


class Origin(BaseModel):
    """How an adapter was called before it was written in a dialect.

    Attributes:
        modules: the modules that each name in the file holds, in the order of their rows.
        ranks: of each of them, where their factors stand in blocks: 0 of a module that the adapter lacks.
        scalings: of modules whose scaling does not come back exactly from an alpha.
        base_model: as PEFT's configuration has it.
        revision: of the base.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    key: ClassVar[str] = "mergekit_lowrank"

    modules: dict[str, list[str]] = Field(default_factory=dict)
    ranks: dict[str, list[NonNegativeInt]] = Field(default_factory=dict)
    scalings: dict[str, FiniteFloat] = Field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, str], *, where: str) -> Origin:
        """What a header says; an empty one where it says nothing.

        Raises:
            CheckpointError: it is not what this package writes.
        """
        try:
            return cls.model_validate_json(metadata.get(cls.key, "{}"))
        except ValidationError as error:
            raise CheckpointError(
                f"{where}: the header key '{cls.key}' is not what this package writes "
                f"({error.errors(include_url=False)[0]['msg']}). Remove the key, or convert the adapter again."
            ) from error

    def text(self) -> str:
        """As it stands in the header."""
        return json.dumps(self.model_dump(exclude_defaults=True))
