"""What a merge says while it runs. Reporters listen; nothing they do changes a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeAlias

__all__ = [
    "Event",
    "MergeFailed",
    "MergeFinished",
    "MergeResumed",
    "MergeStarted",
    "ModuleMerged",
    "Notice",
    "Reporter",
    "SurveyRound",
]


class _Told:
    """What all events have in common."""

    def to_dict(self) -> dict[str, Any]:
        """The event as plain data: its name under ``event``, then its fields."""
        return {"event": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class MergeStarted(_Told):
    """The plan is made; reading begins.

    Attributes:
        modules: how many this process merges; of a sweep, those of every variant.
        bytes_read: of the inputs.
        method: the recipe's merge_method; of a sweep over methods, each once.
        inputs: what messages call them.
        recipe: as plain data, with its defaults; of a sweep, that of the first variant.
    """

    modules: int
    bytes_read: int
    method: str = ""
    inputs: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SurveyRound(_Told):
    """One module was looked at: before the merge proper, or without one.

    Attributes:
        module: its name.
        round: counted from 1.
        modules: how many this round looks at.
        stage: what it is looked at for: ``survey`` of a method or a budget, or another pass such as a diagnosis.
    """

    module: str
    round: int
    modules: int
    stage: str = "survey"


@dataclass(frozen=True)
class MergeResumed(_Told):
    """Some modules are there already, from a merge that was cut off; the others follow.

    Attributes:
        finished: how many; of a sweep, those of every variant.
    """

    finished: int


@dataclass(frozen=True)
class ModuleMerged(_Told):
    """One module is merged and written.

    Attributes:
        module: its name.
        rank: of its merged update; None for a dense one.
        wall_seconds: of its merge, reading and writing apart.
        measures: numbers of its entry in the report, by their names there; None where not defined.
        variant: of a sweep; empty without one.
    """

    module: str
    rank: int | None
    wall_seconds: float
    measures: Mapping[str, float | None] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class Notice(_Told):
    """Something that a user should know now and that the report does not hold, as it changes nothing of the result.

    Attributes:
        message: a sentence.
    """

    message: str


@dataclass(frozen=True)
class MergeFinished(_Told):
    """The output is in place, or in memory.

    Attributes:
        location: the output directory; None for a merge in memory.
        wall_seconds: of the whole merge, planning included.
        totals: of the report; of a sweep such a mapping for each variant, by its name.
        warnings: of the report; of a sweep, each once.
    """

    location: str | None
    wall_seconds: float
    totals: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeFailed(_Told):
    """The merge ended without an output.

    Attributes:
        message: of the error; the name of its kind where it has none, as an interrupt.
    """

    message: str


Event: TypeAlias = MergeStarted | Notice | SurveyRound | MergeResumed | ModuleMerged | MergeFinished | MergeFailed


class Reporter(ABC):
    """Follows one merge. Events come from one thread at a time, in the order in which things happen."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Take one event in."""

    def close(self) -> None:
        """The merge ended, well or not."""
