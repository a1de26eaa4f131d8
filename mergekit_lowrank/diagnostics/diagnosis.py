"""What a diagnosis says, as data: measures of every module, of every pair of inputs, and findings in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lowrank.pages.tables import html_table

__all__ = [
    "SCHEMA_VERSION",
    "Diagnosis",
    "Finding",
    "InputDiagnosis",
    "Matrix",
    "ModuleDiagnosis",
    "PairDiagnosis",
    "Unmeasured",
    "Vector",
]

SCHEMA_VERSION = 1

Vector = tuple[float | None, ...]
"""A number for each participant of a module, or for each input; None where it is not defined."""
Matrix = tuple[Vector, ...]
"""The same for each pair of them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleDiagnosis(_Frozen):
    """One module. Vectors and matrices have an entry for each of its participants, in their order.

    None stands where a measure is not defined: of updates that are zero, of dense ones for all that needs factors.
    """

    module: str = Field(description="its name in the base model")
    d_out: int = Field(description="rows of the update")
    d_in: int = Field(description="its columns")
    participants: tuple[str, ...] = Field(description="labels of the inputs that have it")
    weights: tuple[float, ...] = Field(description="w_t of the participants")
    ranks: tuple[int | None, ...] = Field(description="numerical rank of each ΔW_t; null of a dense one")
    norms: tuple[float, ...] = Field(description="‖ΔW_t‖_F")
    shares: Vector = Field(description="‖w_t ΔW_t‖² as a share of the sum over the participants")
    stable_ranks: Vector = Field(description="‖ΔW_t‖²_F / σ₁²")
    effective_ranks: Vector = Field(description="exp of the entropy of σ / Σσ")
    gaps: Vector = Field(description="σ₁ / σ_k, k the numerical rank: RobustMerge's stark singular values")
    cosines: Matrix = Field(description="of the updates as vectors")
    row_overlaps: Matrix = Field(description="mean cos² of the principal angles of the row spaces: 1 within, 0 apart")
    column_overlaps: Matrix = Field(description="the same of the column spaces")
    smallest_row_angles: Matrix = Field(description="the least principal angle of the row spaces, in radians")
    smallest_column_angles: Matrix = Field(description="the same of the column spaces")
    row_alignments: Matrix = Field(
        description="[s][t]: share of ‖ΔW_s‖ in the leading row directions of ΔW_t, those that hold it to 5 % (SAR)"
    )
    column_alignments: Matrix = Field(description="the same of column directions")
    core_overlap: tuple[float, float] | None = Field(
        description="Core-Space overlap of the row side and of the column side: the mean of the alignments of all pairs"
    )
    sign_conflicts: Matrix = Field(description="share of the entries, not zero in either, whose signs differ")
    sign_conflicts_error: float = Field(description="the largest standard error in them; 0 where all entries were seen")
    sign_conflict: float | None = Field(
        description="share, at most 0.5, of Σ|w ΔW| whose sign is not that of the weighted sum of its entry"
    )
    sign_conflict_error: float = Field(description="its standard error")
    signs_are_sampled: bool = Field(description="whether signs were looked at in a sample of the entries")
    robustness_head: Vector = Field(
        description="direction robustness of the leading quarter of singular directions: cosine of what they are "
        "turned to by the merged update of this recipe"
    )
    robustness_tail: Vector = Field(description="the same of the trailing quarter; null of rank 1")
    sum_effective_rank: float | None = Field(description="effective rank of Σ w ΔW")
    sum_kept_energy: float | None = Field(description="share of ‖Σ w ΔW‖² that its best cut to the output rank keeps")
    output_rank: int | None = Field(description="as planned; null where it depends on the data or nothing is cut")
    is_cut: bool = Field(description="whether the merged update may have more directions than that")
    merged_norm: float = Field(description="norm of the merged update of this recipe before the cut to a rank")


class InputDiagnosis(_Frozen):
    """One input over all modules."""

    label: str = Field(description="what messages call it")
    location: str = Field(description="as the recipe gave it")
    weights: tuple[float, float] = Field(description="the least and the largest of its weights over the modules")
    modules: int = Field(description="how many it has")
    norm: float = Field(description="‖ΔW‖_F over all modules")
    weighted_norm: float = Field(description="‖w ΔW‖_F over all modules")
    share: float | None = Field(description="‖w ΔW‖² as a share of the sum over the inputs; null where all are zero")
    stable_rank: float | None = Field(description="mean over its modules, weighted with ‖ΔW‖²")
    effective_rank: float | None = Field(description="the same")
    gap: float | None = Field(description="geometric mean over its modules, weighted with ‖ΔW‖²")
    robustness_head: float | None = Field(description="mean over its modules, weighted with ‖ΔW‖²")
    robustness_tail: float | None = Field(description="the same")


class PairDiagnosis(_Frozen):
    """All pairs of inputs: means over the modules that both have, weighted with ‖ΔW_s‖·‖ΔW_t‖."""

    cosines: Matrix = Field(description="of these modules taken together, so exact")
    row_overlaps: Matrix
    column_overlaps: Matrix
    smallest_row_angles: Matrix
    smallest_column_angles: Matrix
    row_alignments: Matrix
    column_alignments: Matrix
    sign_conflicts: Matrix


class Finding(_Frozen):
    """One thing that a user should know before merging."""

    rule: str = Field(description="its name in docs/reference/findings.md")
    severity: Literal["info", "notice", "warning"]
    message: str = Field(description="what was found, with the numbers")
    inputs: tuple[str, ...] = Field((), description="labels of those that it is about")
    modules: tuple[str, ...] = Field((), description="those that it is about; empty for all")
    numbers: Mapping[str, float] = Field({}, description="behind the message, by name")
    advice: str = Field("", description="what to try")


class Unmeasured(_Frozen):
    """Measures that some modules do not have."""

    reason: str = Field(description="why, and which measures")
    modules: tuple[str, ...]


class Diagnosis(_Frozen):
    """What stands between the inputs of a recipe and a good merge."""

    schema_version: int = Field(SCHEMA_VERSION, description="of this file; a higher one may lack or rename fields")
    method: str = Field(description="the recipe's merge_method")
    spaces: tuple[str, ...] = Field(description="where modules are merged")
    base_model: str | None = Field(description="that of the merge")
    inputs: tuple[InputDiagnosis, ...]
    pairs: PairDiagnosis
    sign_conflict: float | None = Field(description="mean over the modules, weighted with Σ‖w ΔW‖²")
    core_overlap: tuple[float, float] | None = Field(description="the same, of the row side and of the column side")
    modules: tuple[ModuleDiagnosis, ...]
    findings: tuple[Finding, ...] = Field(description="the weightiest first; never empty")
    sampled: bool = Field(description="whether signs were looked at in a sample of the entries of some module")
    unmeasured: tuple[Unmeasured, ...] = Field(description="what is missing, and where")
    warnings: tuple[str, ...] = Field(description="of the plan")

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of the inputs."""
        return tuple(own.label for own in self.inputs)

    def to_json(self) -> str:
        """The diagnosis as indented JSON: the same bytes for every run."""
        return self.model_dump_json(indent=1) + "\n"

    def _repr_html_(self) -> str:
        """Inputs and findings, for notebooks."""
        inputs = ((own.label, *own.weights, f"{own.norm:.4g}", f"{own.share or 0:.0%}") for own in self.inputs)
        columns = ("input", "least weight", "largest weight", "norm", "share of the energy")
        findings = ((own.severity, own.message, own.advice) for own in self.findings)
        return html_table(columns, inputs, right=columns[1:]) + html_table(("", "found", "what to do"), findings)
