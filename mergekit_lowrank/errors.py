"""The errors users see. Every one is a ``MergeError`` and says where, what was found, what was expected, what to do.

::

    MergeError
    ├── RecipeError               the recipe: syntax, unknown keys, values out of range
    ├── PluginError               a plugin: import failure, duplicate name, misspelt hook
    ├── CheckpointError           one input: missing, corrupt, unsupported, not finite
    ├── IncompatibleInputsError   inputs that cannot be merged with each other
    ├── StrategyError             a strategy or space: unsupported combination, bad result
    ├── MemoryBudgetError         a module that cannot be merged within the memory allowed
    ├── OutputError               the output: exists, inside an input
    │   └── DiskError             the disk is full or failed; what was written is kept
    ├── EvaluationError           an evaluator: failed, took too long, gave no score
    └── InterruptedMergeError     the merge was cut off from outside; what it finished is kept

Anything else that reaches the user is a bug of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "CheckpointError",
    "DiskError",
    "EvaluationError",
    "IncompatibleInputsError",
    "InterruptedMergeError",
    "MemoryBudgetError",
    "MergeError",
    "OutputError",
    "PluginError",
    "RecipeError",
    "StrategyError",
    "causes",
    "nearest_name",
    "raise_together",
]


class MergeError(Exception):
    """What the recipe, the inputs, a plugin or the disk did wrong. The command line exits with status 2."""

    @property
    def problems(self) -> tuple[MergeError, ...]:
        """The single problems of an error that reports several, else the error itself."""
        return self._problems or (self,)

    _problems: tuple[MergeError, ...] = ()


class RecipeError(MergeError):
    """The recipe does not parse, names something unknown, or holds a value out of range."""


class PluginError(MergeError):
    """A plugin failed to import, registers a name twice, or misspells a hook."""


class CheckpointError(MergeError):
    """One input is missing, corrupt, not finite, or of a kind that is not handled."""


class IncompatibleInputsError(MergeError):
    """Inputs do not belong to the same base model or share no module."""


class StrategyError(MergeError):
    """A strategy cannot work in the space asked for, or returned something unusable."""


class MemoryBudgetError(MergeError):
    """A module cannot be merged within the memory allowed."""


class OutputError(MergeError):
    """The output exists, lies inside an input, or cannot be written."""


class DiskError(OutputError):
    """The disk of the output is full or failed. The operating system's error is its `__cause__`."""


class EvaluationError(MergeError):
    """An evaluator failed, took too long, or wrote nothing that can be read as a score."""


class InterruptedMergeError(MergeError):
    """The merge was cut off from outside: a worker died. Its work so far is kept."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, in turn: whoever names the place of an error raises another."""
    raised: BaseException | None = error
    while raised is not None:
        yield raised
        raised = raised.__cause__


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None when none is close."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def raise_together(problems: Sequence[MergeError]) -> None:
    """Raise all collected problems as one error; do nothing when there are none.

    One problem is raised as it is. Several of one class give an error of that class, several of different classes a
    plain ``MergeError``; either way ``problems`` on the error holds each of them.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    kinds = {type(problem) for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else MergeError
    listing = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
    error = kind(f"{len(problems)} problems:\n{listing}")
    error._problems = tuple(problems)
    raise error
