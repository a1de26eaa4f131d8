"""What an evaluation found: the runs, and base, experts and merge beside each other with their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.evaluation.bootstrap import CONFIDENCE, Estimate
from mergekit_lowrank.evaluation.outcomes import Outcome

__all__ = ["SCHEMA_VERSION", "Basis", "Comparison", "Evaluation", "Run"]

SCHEMA_VERSION = 1

Basis: TypeAlias = Literal["examples", "count", "stderr", "none"]
"""What the intervals come from: examples drawn anew, a binomial or a normal distribution, or nothing."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(_Frozen):
    """One model judged on one task."""

    key: str = Field(description="SHA-256 of what was judged and how: the adapter's files, the base and the task")
    task: str = Field(description="its name in the tasks file")
    model: str = Field(description="`base`, the label of an expert, `merged` or `against`")
    outcome: Outcome = Field(description="what the evaluator found")
    wall_seconds: float = Field(description="that it took")


class Comparison(_Frozen):
    """Base, expert and merge on one task, or on the mean over several."""

    name: str = Field(description="of the task; of a mean, what it is over")
    tasks: int = Field(description="how many it is of")
    expert: str | None = Field(description="the label of the task's expert; null where it has none, and of a mean")
    examples: int | None = Field(description="how many each model was judged on; null where that is not known")
    basis: Basis = Field(description="what the intervals come from: `examples`, `count`, `stderr` or `none`")
    base: Estimate | None = Field(description="score of the base; null where it was not evaluated")
    own: Estimate | None = Field(description="score of the task's own expert; null where it has none")
    merged: Estimate = Field(description="score of the merge")
    against: Estimate | None = Field(description="score of the other merge; null where there is none")
    normalised: Estimate | None = Field(
        description="merged / own; of a mean, the mean of these; null where an expert is not above zero"
    )
    gain: Estimate | None = Field(description="merged − base")
    lead: Estimate | None = Field(description="merged − against")


class Evaluation(_Frozen):
    """Whether a merge is better than its base, as good as its experts, and better than another merge."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="of this document")
    is_complete: bool = Field(default=False, description="whether every run is there")
    target: str = Field(description="the recipe or directory that was evaluated")
    against: str | None = Field(default=None, description="the other merge")
    base: str = Field(description="the base model, as evaluators were given it")
    confidence: float = Field(default=CONFIDENCE, description="of the intervals")
    resamples: int = Field(description="replicates that the intervals are quantiles of")
    seed: int = Field(description="of the draws")
    tasks: tuple[Comparison, ...] = Field(default=(), description="each task")
    seen: Comparison | None = Field(default=None, description="mean over the tasks that have an expert")
    unseen: Comparison | None = Field(default=None, description="mean over the others")
    runs: tuple[Run, ...] = Field(default=(), description="what evaluators found")
    warnings: tuple[str, ...] = Field(default=(), description="what is to be known of the figures")

    def to_json(self) -> str:
        """All of it, indented, as ``-o`` writes it."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """The evaluation that was written to a file.

        Raises:
            OutputError: it holds something else.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise OutputError(
                f"{path}: not the results of an evaluation ({error.errors()[0]['msg']}), so it is not replaced; "
                "name another file"
            ) from error

    @property
    def rows(self) -> tuple[Comparison, ...]:
        """The tasks, then the means."""
        return (*self.tasks, *filter(None, (self.seen, self.unseen)))

    def _repr_html_(self) -> str:
        from mergekit_lowrank.evaluation.tables import table  # which is of what stands here
        from mergekit_lowrank.pages.tables import html_table

        columns, rows, right = table(self)
        return html_table(columns, rows, caption=self.target, right=right)
