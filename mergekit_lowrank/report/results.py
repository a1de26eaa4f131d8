"""What a merge did, as data: ``report.json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mergekit_lowrank.engine import ModuleRecord, Plan, dialect_of, format_bytes, loading_server
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import REPORT_NAME, TIMINGS_NAME
from mergekit_lowrank.pages.cells import cell
from mergekit_lowrank.pages.tables import html_table, number
from mergekit_lowrank.servers import SERVERS

__all__ = ["SCHEMA_VERSION", "InputSummary", "Memory", "Report", "Totals", "build_report"]

SCHEMA_VERSION = 2
LARGEST = 1e100
"""No number of a merge is as large: squares of float32 are below 1e77."""
SHOWN_DIGITS = 12


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSummary(_Frozen):
    """One input over all modules."""

    label: str = Field(description="what messages call it")
    location: str = Field(description="as the recipe gave it")
    base_model: str | None = Field(description="the base its configuration names")
    modules: int = Field(description="how many of the merged modules it has")
    weighted_norm: float = Field(description="‖w·ΔW‖_F over all modules")


class Totals(_Frozen):
    """The whole merge in numbers."""

    modules: int = Field(description="how many were merged")
    merged_norm: float = Field(description="‖ΔW‖_F over all modules, as written")
    mean_input_norm: float = Field(description="mean of the inputs' weighted norms")
    kept_energy: float = Field(description="share of Σσ² that the output rank kept, over all modules")
    rank_for_99: int | None = Field(
        description="the least rank that keeps 99 % of the energy in every module; null where it was not computed"
    )
    largest_cut_error: float = Field(
        description="over the modules, ‖M − M_rank‖_F / ‖M‖_F of the cut to the output rank"
    )
    largest_relative_error: float | None = Field(description="over the modules, against the exact weighted sum")
    bytes_read: int = Field(description="of the inputs' factors, each read once")
    bytes_written: int = Field(description="of the merged factors")
    budget_bytes: int | None = Field(description="what they could take, where `output.rank` is a budget")
    wall_seconds: float = Field(description="of the whole merge")


class Memory(_Frozen):
    """What the merge was allowed to hold, and what was held."""

    allowed_bytes: int = Field(description="what it was allowed to hold beside the interpreter and torch")
    planned_peak_bytes: int = Field(description="what its largest module holds at most")
    process_peak_bytes: int | None = Field(
        description="the most that the process held so far, interpreter, torch and file pages included; null on Windows"
    )


class Report(_Frozen):
    """What a merge did.

    ``modules`` holds one entry for each module; the fields are those of ``ModuleRecord``.
    """

    schema_version: int = Field(SCHEMA_VERSION, description="of this file; a higher one may lack or rename fields")
    method: str = Field(description="the recipe's merge_method")
    inputs: tuple[InputSummary, ...] = Field(description="one for each input")
    totals: Totals = Field(description="over all modules")
    kind: str = Field(description="`adapter`, or `model` where the updates were added to the base")
    format: str = Field("peft", description="the dialect that an adapter is written in")
    server: str | None = Field(
        None,
        description="that loads an adapter with nothing lost: `output.target`, or else the first that reads the format",
    )
    rank: int | None = Field(
        description="of every module as written; the largest where ranks differ; null where updates were added whole"
    )
    dtype: str = Field(description="of the stored factors")
    warnings: tuple[str, ...] = Field(description="of the plan and of modules")
    modules: tuple[Mapping[str, Any], ...] = Field(description="one for each module")
    memory: Memory = Field(description="allowed and held; in `timings.json`")

    @property
    def rank_text(self) -> str:
        """``rank 16``, or ``ranks 3 to 40`` where modules differ, or ``whole updates``."""
        if self.rank is None:
            return "whole updates"
        return f"rank {self.rank}" if self.has_one_rank else f"ranks {min(self._written_ranks)} to {self.rank}"

    @property
    def has_one_rank(self) -> bool:
        """Whether all modules are written with the same rank."""
        return self.rank is not None and min(self._written_ranks) == self.rank

    @property
    def _written_ranks(self) -> list[int]:
        ranks = [module["written_rank"] for module in self.modules]
        return [rank for rank in ranks if rank is not None]

    def to_json(self) -> str:
        """The report as indented JSON, without times and memory: the same bytes for every run of one merge."""
        modules = {"__all__": {"wall_seconds", "peak_bytes"}}
        without = {"totals": {"wall_seconds"}, "memory": True, "modules": modules}
        return self.model_dump_json(indent=1, exclude=without) + "\n"  # type: ignore[arg-type]

    def timings(self) -> str:
        """How long the merge took, and each module of it, and what was held, as indented JSON."""
        seconds = {module["module"]: module["wall_seconds"] for module in self.modules}
        peaks = {module["module"]: module["peak_bytes"] for module in self.modules}
        memory = {**self.memory.model_dump(), "modules": peaks}
        data = {"wall_seconds": self.totals.wall_seconds, "modules": seconds, "memory": memory}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def read(cls, directory: str | Path) -> Report:
        """The report of a finished output, from its ``report.json`` and ``timings.json``.

        Raises:
            CheckpointError: one of them is missing, damaged, or of another version of this package.
        """
        path = Path(directory)
        report, times = _read(path / REPORT_NAME), _read(path / TIMINGS_NAME)
        version = report.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path / REPORT_NAME}: has schema version {version!r}, and this version of mergekit-lowrank reads "
                f"{SCHEMA_VERSION}. Merge again, or use the version that its manifest names."
            )
        try:
            report["totals"]["wall_seconds"] = times["wall_seconds"]
            report["memory"] = {name: value for name, value in times["memory"].items() if name != "modules"}
            for module in report["modules"]:
                module["wall_seconds"] = times["modules"][module["module"]]
                module["peak_bytes"] = times["memory"]["modules"][module["module"]]
            report["modules"] = _records(report["modules"])
            found = cls.model_validate(report)
            found._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: {REPORT_NAME} and {TIMINGS_NAME} are not of one merge, or damaged: {_said(error)}. "
                "Merge again."
            ) from error
        return found

    def _check(self) -> None:
        """Raise a ``ValueError`` that says which of its parts do not go together."""
        labels = {own.label for own in self.inputs}
        if not labels:
            raise ValueError("it has no inputs")
        if self.server is not None and self.server not in SERVERS:
            raise ValueError(f"there is no server '{self.server}'")
        if self.rank is not None and not self._written_ranks:
            raise ValueError("it has a rank, and none of its modules has one")
        for module in self.modules:
            count, cosines = len(module["participants"]), module["cosines"]
            lengths = {len(module["input_norms"]), len(module["input_spectra"]), *map(len, cosines)}
            if lengths != {count} or len(cosines) not in (0, count) or not labels.issuperset(module["participants"]):
                raise ValueError(f"module '{module['module']}' is not of its inputs")

    def _repr_html_(self) -> str:
        """For notebooks: the totals, and inputs and modules to unfold."""
        columns = ("module", "rank", "norm", "energy kept", "cut error", "error", "sign conflict")
        names = ("rank", "merged_norm", "kept_energy", "cut_error", "relative_error", "sign_conflict")
        rows = ((module["module"], *(number(module[name]) for name in names)) for module in self.modules)
        inputs = ((own.label, own.location, own.modules, number(own.weighted_norm)) for own in self.inputs)
        input_columns = ("input", "location", "modules", "norm times weight")
        return cell(
            f"Merge with {self.method}",
            self._facts(),
            {
                f"{len(self.inputs)} inputs": html_table(input_columns, inputs, right=input_columns[2:]),
                f"{len(self.modules)} modules": html_table(columns, rows, right=columns[1:]),
            },
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        totals = self.totals
        size, seconds = format_bytes(totals.bytes_written), f"{totals.wall_seconds:.1f} s"
        yield "output", f"{self.kind}, {self.rank_text}, {self.dtype}, {size}"
        yield "norm", f"{number(totals.merged_norm)}; of the inputs {number(totals.mean_input_norm)} in the mean"
        kept = math.floor(10_000 * totals.kept_energy) / 100  # a share that was cut never reads as whole
        needed = "a higher rank" if totals.rank_for_99 is None else f"rank {totals.rank_for_99}"
        yield "energy kept", f"{kept:g} %; 99 % in every module need {needed}"
        yield "largest cut error", number(totals.largest_cut_error)
        yield "largest error", f"{number(totals.largest_relative_error)} against the exact weighted sum"
        yield "time", seconds
        yield from (("warning", warning) for warning in self.warnings)


@dataclass(frozen=True, kw_only=True)
class _Written(ModuleRecord):
    """A record as the file holds it."""

    written_rank: int | None


@cache
def _types() -> TypeAdapter[dict[str, list[_Written]]]:
    return TypeAdapter(dict[str, list[_Written]])


def _records(modules: object) -> list[Mapping[str, Any]]:
    """Modules as ``ModuleRecord.to_dict`` gave them, their types checked."""
    return [vars(own) for own in _types().validate_python({"modules": modules})["modules"]]


def _said(error: Exception) -> str:
    """What is wrong, and where."""
    if not isinstance(error, ValidationError):
        return f"{error}" if isinstance(error, ValueError) else f"{error!r}"
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) < LARGEST:
        raise ValueError(f"no merge writes the number {text[:SHOWN_DIGITS]}")
    return value


def _whole_number(text: str) -> int:
    _number(text)
    return int(text)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: has no {path.name}; expected what a merge has made.")
    try:
        found = json.loads(path.read_bytes(), parse_float=_number, parse_int=_whole_number, parse_constant=_number)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}. Merge again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; expected a JSON object. Merge again.")
    return found


def build_report(
    plan: Plan,
    records: Sequence[ModuleRecord],
    ranks: Mapping[str, int],
    *,
    wall_seconds: float,
    warnings: Sequence[str] = (),
) -> Report:
    """The report of a finished merge.

    Args:
        plan: what was done.
        records: one for each module.
        ranks: of each module as written; empty where updates were added to the base.
        wall_seconds: of the whole merge.
        warnings: beside those of the plan and of modules.
    """
    inputs = tuple(_input_summary(plan, records, t) for t in range(len(plan.inputs)))
    if plan.folds and plan.recipe.output.rank is not None:  # cut, then added
        ranks = {record.module: record.rank for record in records if record.rank is not None}
    return Report(
        method=plan.recipe.merge_method,
        inputs=inputs,
        totals=_totals(plan, records, ranks, inputs, wall_seconds),
        kind=plan.recipe.output.kind,
        format=dialect_of(plan.recipe),
        server=loading_server(plan, ranks),
        rank=max(ranks.values(), default=None),
        dtype=str(plan.out_dtype).removeprefix("torch."),
        warnings=(*plan.warnings, *_gathered(records), *warnings),
        modules=tuple({**record.to_dict(), "written_rank": ranks.get(record.module)} for record in records),
        memory=Memory(
            allowed_bytes=plan.memory_bytes,
            planned_peak_bytes=plan.overhead_bytes + plan.peak_bytes,
            process_peak_bytes=_process_peak_bytes(),
        ),
    )


def _process_peak_bytes() -> int | None:
    """The high-water mark of resident memory."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _input_summary(plan: Plan, records: Sequence[ModuleRecord], t: int) -> InputSummary:
    checkpoint = plan.inputs[t]
    norms = [
        r.input_norms[r.participants.index(checkpoint.label)] for r in records if checkpoint.label in r.participants
    ]
    return InputSummary(
        label=checkpoint.label,
        location=checkpoint.location,
        base_model=checkpoint.base_model,
        modules=len(norms),
        weighted_norm=math.hypot(*norms),
    )


def _totals(
    plan: Plan,
    records: Sequence[ModuleRecord],
    ranks: Mapping[str, int],
    inputs: Sequence[InputSummary],
    wall_seconds: float,
) -> Totals:
    energy = sum(record.energy for record in records)
    needed = [record.rank_for_99 for record in records if record.module in ranks or plan.folds]
    errors = [record.relative_error for record in records if record.relative_error is not None]
    return Totals(
        modules=len(records),
        merged_norm=math.hypot(*(record.merged_norm for record in records)),
        mean_input_norm=sum(summary.weighted_norm for summary in inputs) / len(inputs),
        kept_energy=sum(r.kept_energy * r.energy for r in records) / energy if energy else 1.0,
        rank_for_99=None if None in needed else max((rank for rank in needed if rank is not None), default=0),
        largest_cut_error=max((record.cut_error for record in records), default=0.0),
        largest_relative_error=max(errors, default=None),
        bytes_read=plan.bytes_read,
        bytes_written=_bytes_written(plan, ranks),
        budget_bytes=plan.budget_bytes,
        wall_seconds=wall_seconds,
    )


def _bytes_written(plan: Plan, ranks: Mapping[str, int]) -> int:
    if plan.fold is not None:
        return plan.fold.layout.total_bytes
    factored = (module for module in plan.modules if module.name in ranks)
    whole = (module for module in plan.modules if not module.is_factored)
    return sum(ranks[module.name] * module.bytes_per_rank(plan.out_dtype) for module in factored) + sum(
        module.shape.d_out * module.shape.d_in * module.dtype.itemsize for module in whole
    )


def _gathered(records: Sequence[ModuleRecord]) -> list[str]:
    """The warnings of all modules as one line: the first, and how many modules have one too."""
    affected = [record for record in records if record.warnings]
    if not affected:
        return []
    first = affected[0]
    more = f" (and {len(affected) - 1} more modules; see report.json)" if len(affected) > 1 else ""
    return [f"module '{first.module}': {first.warnings[0]}{more}"]
