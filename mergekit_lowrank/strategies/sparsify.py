"""Which entries of each input are kept: the step before they are added up or elected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.spaces import Part
from mergekit_lowrank.strategies.base import MergeContext, Params, column, per_input
from mergekit_lowrank.strategies.stages import (
    drop_and_rescale,
    magnitude_ranks,
    trim_by_magnitude,
    trim_outliers,
)
from mergekit_lowrank.strategies.thresholds import ThresholdSurvey, thresholds_of

__all__ = [
    "DropParams",
    "MagnitudeParams",
    "MagnitudeTrim",
    "OutlierParams",
    "OutlierTrim",
    "RandomDrop",
    "RankedDrop",
    "RankedDropParams",
    "Scope",
    "Sparsifier",
    "SparsifierParams",
    "ThresholdTrim",
]

Trim: TypeAlias = Callable[[Tensor], Tensor]
"""Gives what is kept of a block (n, …), which it may overwrite; called for every block of a part, in order."""


class SparsifierParams(Params):
    """Parameters that every sparsifier has."""

    density: float = per_input(0.2, ge=0, le=1, description="share of each input's entries that is kept")


class Sparsifier(ABC):
    """Keeps some entries of each input."""

    Params: ClassVar[type[SparsifierParams]]

    def __init__(self, params: SparsifierParams) -> None:
        self.params = params

    @abstractmethod
    def start(self, part: Part, context: MergeContext) -> Callable[[], Trim]:
        """What gives a fresh trim for each pass over the part; thresholds are found here, once."""

    def prepared(self, part: Part, context: MergeContext) -> Callable[[], Trim]:
        """``start``, rescaled to the inputs' own L1 norms where the parameters say so (one more pass)."""
        start = self.start(part, context)
        if getattr(self.params, "rescale", "none") != "norm":
            return start
        ratios = column(_norm_ratios(part, start()), part)

        def rescaled() -> Trim:
            trim = start()
            return lambda block: trim(block).mul_(ratios)

        return rescaled

    def survey(self) -> ThresholdSurvey | None:
        """A new survey where thresholds are those of the whole model, else None."""
        return None


def _norm_ratios(part: Part, trim: Trim) -> list[float]:
    """‖x_t‖₁ / ‖what is kept of it‖₁; 1 where either is zero."""
    before = torch.zeros(part.inputs, dtype=torch.float64)
    after = torch.zeros(part.inputs, dtype=torch.float64)
    for block in part.blocks():
        before += _l1(block)
        after += _l1(trim(part.own(block)))
    return [float(b / a) if a > 0 and b > 0 else 1.0 for b, a in zip(before, after, strict=True)]


def _l1(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block.flatten(1), 1, dim=1)
    return norms.cpu().double()


class ThresholdTrim(Sparsifier):
    """Keeps entries by their magnitude, against thresholds of one module or of the whole model.

    A subclass says which ranks its thresholds have, and how to trim with them.
    """

    @abstractmethod
    def ranks(self, size: int, density: float) -> tuple[int, ...]:
        """Which of ``size`` magnitudes, counted from the smallest (1-indexed), are the thresholds; 0 stands for 0.0."""

    @abstractmethod
    def trim(self, block: Tensor, thresholds: Sequence[Sequence[float]]) -> Tensor:
        """What is kept of a block (n, …), which may be overwritten, given the thresholds of each of the n inputs."""

    def start(self, part: Part, context: MergeContext) -> Callable[[], Trim]:
        """The same trim for every pass."""
        thresholds = self._thresholds(part, context)
        return lambda: lambda block: self.trim(block, thresholds)

    def _thresholds(self, part: Part, context: MergeContext) -> list[tuple[float, ...]]:
        if isinstance(context.survey, ThresholdSurvey):
            return context.survey.of(part, context)
        return thresholds_of(part, context, self.params, self.ranks)

    def survey(self) -> ThresholdSurvey | None:
        """Model-wide thresholds where ``scope`` asks for them."""
        scope = getattr(self.params, "scope", "tensor")
        return ThresholdSurvey(self.params, self.ranks) if scope == "model" else None


Scope = Annotated[
    Literal["tensor", "model"],
    Field(
        description="one threshold a module (mergekit, peft), or one over all modules of the same method and "
        "parameters, as the paper's code of TIES has it (a survey reads the inputs up to four times)"
    ),
]
NormRescale = Annotated[
    Literal["none", "norm"],
    Field(
        description="norm: multiply what is kept of an input so that its L1 norm is what it was (mergekit's `rescale`)"
    ),
]


class MagnitudeParams(SparsifierParams):
    """Parameters of ``MagnitudeTrim``."""

    density: float = per_input(
        0.2, ge=0, le=1, description="share of each input's entries that is kept, the largest; 1 keeps all"
    )
    scope: Scope = "tensor"
    inclusive: bool = Field(
        True,
        description="keep ⌊density·n⌋ + 1 entries, as the paper's code of TIES does; false: ⌊density·n⌋, but at "
        "least one (mergekit, peft). Entries that tie with the threshold are kept either way",
    )
    rescale: NormRescale = "none"


class MagnitudeTrim(ThresholdTrim):
    """Keeps the largest entries of each input.

    Source: TIES-Merging (Yadav et al. 2023, arXiv:2306.01708), section 3, trim.
    """

    Params = MagnitudeParams
    params: MagnitudeParams

    def ranks(self, size: int, density: float) -> tuple[int]:
        """The threshold that keeps ⌊density·size⌋ entries, or one more."""
        if density == 1:
            return (0,)
        rank = size - int(size * density) + (0 if self.params.inclusive else 1)
        return (min(rank, size),)

    def trim(self, block: Tensor, thresholds: Sequence[Sequence[float]]) -> Tensor:
        """Entries at or above the threshold."""
        return trim_by_magnitude(block, [lowest for (lowest,) in thresholds], out=block)


class OutlierParams(SparsifierParams):
    """Parameters of ``OutlierTrim``."""

    density: float = per_input(0.9, ge=0, le=1, description="share of each input's entries that is kept")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the entries that is removed as outliers, the largest")
    scope: Scope = "tensor"
    rescale: NormRescale = "none"


class OutlierTrim(ThresholdTrim):
    """Removes the largest and the smallest entries of each input.

    Where density + γ > 1 fewer outliers are removed, as mergekit does.

    Source: Model Breadcrumbs (Davari & Belilovsky 2023, arXiv:2312.06795), section 3; mergekit's ``breadcrumbs``.
    """

    Params = OutlierParams
    params: OutlierParams

    def ranks(self, size: int, density: float) -> tuple[int, int]:
        """The smallest and the largest entry that is kept; 0 where no small one is removed."""
        kept = max(1, int(density * size))
        largest = min(int(self.params.gamma * size), size - kept)
        smallest = size - kept - largest
        return (smallest + 1 if smallest else 0, size - largest)

    def trim(self, block: Tensor, thresholds: Sequence[Sequence[float]]) -> Tensor:
        """Entries between the two thresholds, both included."""
        lowest, highest = zip(*thresholds, strict=True)
        return trim_outliers(trim_by_magnitude(block, lowest, out=block), highest, out=block)


Rescale = Literal["probability", "norm", "none"]


class DropParams(SparsifierParams):
    """Parameters of ``RandomDrop``."""

    density: float = per_input(
        0.5, ge=0, le=1, description="probability that an entry is kept (1 − the paper's drop rate); 1 keeps all"
    )
    rescale: Rescale = Field(
        "probability",
        description="probability: divide what is kept by the probability of being kept, so that its mean stays "
        "(the paper, peft); norm: by what keeps the L1 norm of an input (mergekit); none",
    )


class RandomDrop(Sparsifier):
    """Keeps each entry with the same probability, from random numbers keyed by (seed, module, input, part).

    Source: DARE (Yu et al. 2023, arXiv:2311.03099), section 3.2.
    """

    Params = DropParams
    params: DropParams

    def start(self, part: Part, context: MergeContext) -> Callable[[], Trim]:
        """The same random numbers for every pass."""
        densities = context.each(self.params, "density")

        def fresh() -> Trim:
            streams = [context.random_words(t, part.name) for t in range(part.inputs)]

            def trim(block: Tensor) -> Tensor:
                probabilities = self.probabilities(block, column(densities, part), part.axis)
                uniform = torch.empty(block.shape)
                for stream, numbers in zip(streams, uniform, strict=True):
                    _draw(stream, numbers if part.axis == 0 else numbers.T)
                return drop_and_rescale(
                    block, probabilities, uniform.to(part.device), rescale=self.params.rescale == "probability"
                )

            return trim

        return fresh

    def probabilities(self, block: Tensor, densities: Tensor, axis: int) -> Tensor:
        """The probability with which each entry of a block (n, …) is kept; here the density of its input."""
        del block, axis
        return densities


def _draw(words: np.random.SFC64, lines: Tensor) -> None:
    """Write random multiples of 2⁻²⁴ in [0, 1); each line takes whole words, so that it gets the same in any block."""
    count, length = lines.shape
    drawn = words.random_raw(count * -(-length // 2)).view(np.uint32).reshape(count, -1)[:, :length]
    drawn >>= 8
    lines.copy_(torch.from_numpy(drawn.view(np.int32))).mul_(2**-24)


class RankedDropParams(DropParams):
    """Parameters of ``RankedDrop``."""

    epsilon: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="the smallest entry of a row is kept with probability density − ε, the largest with density + ε, "
        "those between by their rank; probabilities are cut to [0, 1]",
    )


class RankedDrop(RandomDrop):
    """Keeps larger entries of a row with a higher probability.

    Zeros are not ranked. A row is one of the delta; in a space that is read by columns, a column.

    Source: DELLA (Deep et al. 2024, arXiv:2406.11617), section 3.1, MagPrune; mergekit's ``della``.
    """

    Params = RankedDropParams
    params: RankedDropParams

    def probabilities(self, block: Tensor, densities: Tensor, axis: int) -> Tensor:
        """From density − ε to density + ε along each row, by rank; 1 where the density is 1."""
        spread = magnitude_ranks(block, dim=2 - axis).mul_(2).sub_(1).mul_(self.params.epsilon)
        return torch.maximum(spread.add_(densities).clamp_(0, 1), (densities == 1).to(densities))
