"""How far scores, ratios and differences could be off: replicates by the bootstrap, and intervals of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation.outcomes import Outcome

__all__ = ["CONFIDENCE", "Estimate", "Sample", "combined", "divided", "mean_of", "samples_of"]

CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1 << 20
"""Indices of examples, or counts of outcomes, that are held at once."""
COUNTED_FROM = 1000
"""Examples from which on outcomes that recur are counted, which is far faster."""

ROUNDING = 1e-9
"""Means of the same numbers in another order differ by less."""

Array = npt.NDArray[np.float64]


class Estimate(BaseModel):
    """A number with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(description="as measured")
    low: float | None = Field(description="the lower end of its interval; null where nothing says how sure it is")
    high: float | None = Field(description="the upper end")

    @property
    def is_beyond_noise(self) -> bool:
        """Of a difference: whether its interval leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, eq=False)
class Sample:
    """A number, and what it would have been on examples drawn anew.

    Attributes:
        value: as measured.
        replicates: (resamples,); None where nothing says how sure the value is.
    """

    value: float
    replicates: Array | None

    def estimate(self) -> Estimate:
        """The value with the percentile interval of its replicates (Efron & Tibshirani 1993, section 13.3).

        It holds the value in any case. There is none where replicates do not vary, which says that examples came out
        alike, and not how sure that is; but a difference that was zero each time stays the zero that it is.
        """
        if self.replicates is None or not np.isfinite(self.replicates).all() or self._is_constant(self.replicates):
            return Estimate(value=self.value, low=None, high=None)
        tail = (1 - CONFIDENCE) / 2
        low, high = map(float, np.quantile(self.replicates, [tail, 1 - tail]))
        return Estimate(value=self.value, low=min(low, self.value), high=max(high, self.value))

    def _is_constant(self, replicates: Array) -> bool:
        return self.value != 0 and np.allclose(replicates, self.value, rtol=ROUNDING, atol=0)


def combined(function: Callable[..., Array | float], *samples: Sample) -> Sample:
    """The function of several numbers: of their values, and replicate by replicate."""
    replicates = [sample.replicates for sample in samples]
    known = [own for own in replicates if own is not None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(function(*(sample.value for sample in samples)))
        return Sample(value, np.asarray(function(*known)) if len(known) == len(samples) else None)


def mean_of(samples: Sequence[Sample]) -> Sample:
    """The mean over tasks, each of which weighs alike."""
    return combined(lambda *values: sum(values) / len(values), *samples)


def samples_of(task: str, outcomes: Mapping[str, Outcome], *, resamples: int, seed: int) -> dict[str, Sample]:
    """Replicates of every model's score on one task.

    Examples are drawn with replacement, the same ones for all models, so that differences and ratios are paired. A
    score without examples gets replicates of its own: binomial ones with a count, normal ones with a standard error.
    Where all answers are right, or wrong, drawing them anew would give the same: the share is then as far off as
    Clopper & Pearson (Biometrika 26, 1934) have it, for whom n of n right leaves a share of Beta(n, 1).

    Args:
        task: its name, which seeds the draws together with ``seed``.
        outcomes: of each model.
        resamples: how many replicates.
        seed: of the draws.

    Raises:
        EvaluationError: models were judged on different numbers of examples.
    """
    rng = np.random.default_rng([seed, crc32(task.encode())])
    paired = [name for name, outcome in outcomes.items() if outcome.examples]
    counts = {name: len(outcomes[name].examples) for name in paired}
    if len({*counts.values()}) > 1:
        found = ", ".join(f"{count} of '{name}'" for name, count in counts.items())
        raise EvaluationError(f"task '{task}': outcomes of {found}; expected the same examples for every model")
    drawn = _drawn([outcomes[name].examples for name in paired], rng, resamples) if paired else ()
    replicates: dict[str, Array] = dict(zip(paired, drawn, strict=True))
    return {
        name: Sample(outcome.score, _replicates(outcome, replicates.get(name), rng, resamples))
        for name, outcome in outcomes.items()
    }


def _replicates(outcome: Outcome, drawn: Array | None, rng: np.random.Generator, resamples: int) -> Array | None:
    """Those of one score; None where nothing says how sure it is.

    Args:
        outcome: with the score.
        drawn: its means over examples drawn anew, where it has examples.
        rng: of the draws.
        resamples: how many replicates.
    """
    if len({*outcome.examples}) > 1:
        return drawn
    if outcome.stderr and not outcome.examples:
        return rng.normal(outcome.score, outcome.stderr, resamples)
    count = len(outcome.examples) or outcome.count
    if count is not None and outcome.score in (0, 1):
        return np.abs(outcome.score - rng.beta(1, count, resamples))
    if outcome.count is not None and not outcome.examples:
        return rng.binomial(outcome.count, outcome.score, resamples) / outcome.count
    return None


def _drawn(examples: Sequence[Sequence[float]], rng: np.random.Generator, resamples: int) -> Array:
    """(models, resamples): means over examples drawn with replacement."""
    table = np.asarray(examples)
    count = table.shape[1]
    distinct, times = np.unique(table, axis=1, return_counts=True)
    if count >= COUNTED_FROM and len(times) <= count // 4:
        shares = times / count
        blocks = [distinct @ rng.multinomial(count, shares, own).T / count for own in _blocks(resamples, len(times))]
    else:
        blocks = [table[:, rng.integers(0, count, (own, count))].mean(axis=2) for own in _blocks(resamples, count)]
    return np.concatenate(blocks, axis=1)


def _blocks(resamples: int, width: int) -> Iterator[int]:
    """How many replicates to draw at a time, of ``width`` numbers each."""
    at_once = max(1, DRAWN_AT_ONCE // width)
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)


def divided(first: Array | float, second: Array | float) -> Array | float:
    """``first / second``; where that is no ratio of accuracies, since the second is not above zero, not a number."""
    return np.where(np.asarray(second) > 0, np.divide(first, second), math.nan)
