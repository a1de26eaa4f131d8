"""What a merge says while it runs. Reporters listen; nothing they do changes a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

__all__ = ["Event", "MergeFinished", "MergeStarted", "ModuleMerged", "Notice", "Reporter", "SurveyRound"]


@dataclass(frozen=True)
class MergeStarted:
    """The plan is made; reading begins.

    Attributes:
        modules: how many will be merged.
        bytes_read: of the inputs.
    """

    modules: int
    bytes_read: int


@dataclass(frozen=True)
class SurveyRound:
    """One module was looked at by a survey, before the merge proper.

    Attributes:
        module: its name.
        round: counted from 1.
        modules: how many this round looks at.
    """

    module: str
    round: int
    modules: int


@dataclass(frozen=True)
class ModuleMerged:
    """One module is merged and written.

    Attributes:
        module: its name.
        rank: of its merged update; None for a dense one.
        wall_seconds: of its merge, reading and writing apart.
    """

    module: str
    rank: int | None
    wall_seconds: float


@dataclass(frozen=True)
class Notice:
    """Something that a user should know now and that the report does not hold, as it changes nothing of the result.

    Attributes:
        message: a sentence.
    """

    message: str


@dataclass(frozen=True)
class MergeFinished:
    """The output is in place, or in memory.

    Attributes:
        location: the output directory; None for a merge in memory.
        wall_seconds: of the whole merge, planning included.
    """

    location: str | None
    wall_seconds: float


Event: TypeAlias = MergeStarted | Notice | SurveyRound | ModuleMerged | MergeFinished


class Reporter(ABC):
    """Follows one merge. Events come from one thread at a time, in the order in which things happen."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Take one event in."""

    def close(self) -> None:
        """The merge ended, well or not."""
