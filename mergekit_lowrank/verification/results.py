"""What a verification found, as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from mergekit_lowrank.pages.tables import html_table

__all__ = ["SCHEMA_VERSION", "Fault", "FaultKind", "ModuleCheck", "Verification"]

SCHEMA_VERSION = 1

FaultKind = Literal["output", "source", "structure", "values", "zero", "scaling", "recipe", "recomputation"]


READING = ("structure", "values", "zero", "scaling")
"""Faults that are found when an output is read."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Fault(_Frozen):
    """One thing that is not as it should be."""

    kind: FaultKind = Field(
        description="`output`, `source`: a file is missing or has changed; `structure`: modules, shapes, ranks, types; "
        "`values`: not finite; `zero`: an update was lost; `scaling`: one is not as large as was merged; `recipe`: it "
        "cannot be merged again; `recomputation`: it was, to another result"
    )
    where: str = Field(description="the file, module or input")
    message: str = Field(description="what was found, what was expected, and what to do")

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ModuleCheck(_Frozen):
    """One module against its recomputation."""

    module: str = Field(description="its name, after that of the variant in a sweep")
    error: float | None = Field(
        description="‖found − recomputed‖_F / ‖recomputed‖_F of its update; null where that is no finite number: what "
        "was found holds one that is not, or should be zero"
    )
    tolerance: float = Field(
        description="1e-4, and what the rounding of the stored type can come to in this module; 2 where it was cut "
        "between equal singular values, and the norms agree"
    )
    is_identical: bool = Field(description="whether every bit is the same")

    @property
    def is_ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error is not None and self.error <= self.tolerance


class Verification(_Frozen):
    """What was checked of the output of a merge, and what was found."""

    schema_version: int = Field(SCHEMA_VERSION, description="of this document; a higher one may lack or rename fields")
    location: str = Field(description="the output, as it was given")
    variants: tuple[str, ...] = Field((), description="of a sweep; the names of modules and files begin with them")
    output_files: int = Field(description="of the output whose hashes were compared with the manifest")
    source_files: int = Field(description="of the inputs whose hashes were compared with it")
    modules: int = Field(description="of the output that were read: ranks, types, finite values, norms")
    is_recomputed: bool = Field(description="whether the recipe was run again and compared")
    recomputed: tuple[ModuleCheck, ...] = Field((), description="one for each module that was compared")
    faults: tuple[Fault, ...] = Field((), description="what is not as it should be")
    information: tuple[str, ...] = Field((), description="what to know that is no fault")

    @computed_field(description="whether there is no fault")  # type: ignore[prop-decorator]
    @property
    def is_ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @computed_field(description="of the modules that were compared; null of none")  # type: ignore[prop-decorator]
    @property
    def largest_error(self) -> float | None:
        """Of the modules that were compared; None of none, or where one has none."""
        errors = [check.error for check in self.recomputed]
        return None if not errors or None in errors else max(error for error in errors if error is not None)

    @computed_field(description="modules that were recomputed to the same bits")  # type: ignore[prop-decorator]
    @property
    def identical(self) -> int:
        """How many modules were recomputed to the same bits."""
        return sum(check.is_identical for check in self.recomputed)

    def to_json(self) -> str:
        """The verification as indented JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @property
    def summary(self) -> str:
        """One line: what was proven, or how many faults there are."""
        if not self.is_ok:
            return f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}"
        return "; ".join(f"{what} {proof}" for what, proof in self.lines())

    def lines(self) -> Iterator[tuple[str, str]]:
        """What was proven, by the kind of proof."""
        hashed = f"{self.output_files} of the output, {self.source_files} of the inputs"
        yield "hashes", f"{hashed} compared with the manifest"
        if self.variants:
            yield "variants", ", ".join(self.variants)
        is_as_said = self.modules and not any(fault.kind in READING for fault in self.faults)
        yield "modules", f"{self.modules} read" + (": as the report has them, every value finite" if is_as_said else "")
        if not self.is_recomputed:
            yield "recomputed", "no"
            return
        error = "" if self.largest_error is None else f"; largest error {self.largest_error:.2g}"
        yield "recomputed", f"{len(self.recomputed)} modules, {self.identical} of them to the same bits{error}"

    def _repr_html_(self) -> str:
        verdict = "verified" if self.is_ok else f"{len(self.faults)} faults"
        proven = html_table(("", ""), list(self.lines()), caption=f"{self.location}: {verdict}")
        if self.is_ok:
            return proven
        return proven + html_table(("kind", "where", "fault"), [(f.kind, f.where, f.message) for f in self.faults])
