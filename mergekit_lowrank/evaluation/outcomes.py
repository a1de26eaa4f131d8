"""What an evaluator found: a score, and what says how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["Outcome", "as_outcome"]

SAME_MEAN = 1e-3
"""A score printed with three digits is that of its examples."""


class Outcome(BaseModel):
    """The score of one model on one task; higher is better."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    score: float = Field(description="the score; the mean of the examples where they are known")
    examples: tuple[float, ...] = Field(default=(), description="the outcome of each example, in the task's order")
    stderr: float | None = Field(default=None, ge=0, description="the standard error of a score without examples")
    count: int | None = Field(
        default=None, ge=1, lt=1 << 63, description="the examples that a share of right answers is of"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Outcome:
        mean = sum(self.examples) / len(self.examples) if self.examples else self.score
        if not math.isclose(mean, self.score, rel_tol=SAME_MEAN, abs_tol=SAME_MEAN):
            why = (
                "the score is {score}, and the mean of its examples {mean}; give either, or examples that average to it"
            )
            raise PydanticCustomError("inconsistent", why, {"score": self.score, "mean": mean})
        if self.count is not None and not 0 <= self.score <= 1:
            why = "the score is {score}; with a count it is a share of right answers, between 0 and 1"
            raise PydanticCustomError("inconsistent", why, {"score": self.score})
        return self


def as_outcome(found: Any) -> Outcome:
    """The outcome that an evaluator's answer stands for.

    Args:
        found: an ``Outcome``; a number; or the outcomes of the examples, in a sequence, an array or a tensor.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(found, Outcome):
        return found
    plain = _plain(found)
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        examples = tuple(map(_number, plain))
        if not examples:
            raise ValueError("a list of outcomes without an entry")
        return Outcome(score=sum(examples) / len(examples), examples=examples)
    return Outcome(score=_number(plain))


def _plain(value: Any) -> Any:
    """Python's own numbers out of an array, a tensor or a scalar of theirs."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any) -> float:
    """A finite number out of a number, true or false."""
    plain = _plain(value)
    if isinstance(plain, int | float):
        with suppress(OverflowError):  # an integer that no float comes near
            if math.isfinite(plain):
                return float(plain)
    raise TypeError(f"expected a finite number or a list of them, found {value!r:.60}")
