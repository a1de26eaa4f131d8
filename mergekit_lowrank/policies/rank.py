"""How a merged update becomes an adapter of some rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mergekit_lowrank.lowrank import LowRankUpdate, Spectrum, Update, factorise, norm, spectrum_of

__all__ = [
    "VLLM_RANKS",
    "BudgetRank",
    "Compressed",
    "EnergyRank",
    "ErrorRank",
    "FixedRank",
    "RankPolicy",
    "WholeRank",
    "snapped",
]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""


def snapped(rank: int, accepted: Sequence[int]) -> int | None:
    """The least of the ``accepted`` ranks (ascending) that is not below ``rank``; None beyond the largest.

    Where ``accepted`` is empty every rank is accepted.
    """
    return next((allowed for allowed in accepted if allowed >= rank), None) if accepted else rank


@dataclass(frozen=True, eq=False)
class Compressed:
    """An update as it will be written, and what it cost.

    Attributes:
        update: low-rank, or any where nothing was cut.
        spectrum: of the update before it was cut.
    """

    update: Update
    spectrum: Spectrum

    @property
    def rank(self) -> int | None:
        """Of the update; None for a dense one."""
        return self.update.rank if isinstance(self.update, LowRankUpdate) else None

    @property
    def factors(self) -> LowRankUpdate:
        """The update of a policy that cuts."""
        assert isinstance(self.update, LowRankUpdate)  # noqa: S101 - only ``WholeRank`` leaves one dense
        return self.update

    @property
    def kept_energy(self) -> float:
        """Share of ‖ΔW‖²_F that was kept."""
        return 1.0 if self.rank is None else self.spectrum.kept(self.rank)

    @property
    def error(self) -> float:
        """Of the cut: ‖ΔW − ΔW_rank‖_F / ‖ΔW‖_F."""
        return 0.0 if self.rank is None else self.spectrum.error(self.rank)


class RankPolicy(ABC):
    """Decides the rank of one module.

    Class attributes:
        name: what decides, in one word.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def planned(self) -> int | None:
        """The rank where it is known from headers alone, else None."""

    @abstractmethod
    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """The best approximation of ``update`` at the rank decided; an update of no higher rank is left untouched."""


@dataclass(frozen=True)
class FixedRank(RankPolicy):
    """At most ``rank`` directions."""

    name = "number"
    rank: int

    @property
    def planned(self) -> int:
        """The rank."""
        return self.rank

    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """Factors untouched where they are small enough, else the leading ``rank`` singular directions."""
        if isinstance(update, LowRankUpdate) and update.rank <= self.rank:
            return Compressed(update, spectrum_of(update))
        truncation = factorise(update, self.rank, generator)
        return Compressed(truncation.cut(self.rank), truncation.spectrum)


@dataclass(frozen=True)
class WholeRank(RankPolicy):
    """Nothing is cut: the update is added to weights of the base model."""

    name = "whole"

    @property
    def planned(self) -> None:
        """There is none."""
        return None

    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """The update itself; of a dense one the energy is all that is known."""
        del generator
        if isinstance(update, LowRankUpdate):
            return Compressed(update, spectrum_of(update))
        nothing = torch.zeros(0, dtype=torch.float64)
        return Compressed(update, Spectrum(nothing, norm(update) ** 2, complete=False))


class SpectralRank(RankPolicy):
    """The rank that the singular values of the module ask for, at least 1.

    Attributes:
        limit: min(d_out, d_in).
        first_guess: directions a large dense update is first decomposed to; doubled until they are enough.
        accepted: ranks that may be written, ascending; empty for all. Directions up to the next of them are free.
    """

    limit: int
    first_guess: int
    accepted: tuple[int, ...]

    @property
    def planned(self) -> None:
        """Known only once the module is merged."""
        return None

    @abstractmethod
    def rank_of(self, spectrum: Spectrum) -> int | None:
        """The rank asked for; None where the spectrum was not computed far enough."""

    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """The leading directions that are asked for and those that are free; at least one."""
        asked = self.first_guess
        state = generator.get_state()
        while True:
            generator.set_state(state)  # the same start whatever was tried before
            truncation = factorise(update, min(asked, self.limit), generator)
            rank = self.rank_of(truncation.spectrum)
            if rank is not None or asked >= self.limit:
                # A zero update needs rank 0 and gets one direction; what is never reached takes all.
                needed = self.limit if rank is None else max(1, rank)
                return Compressed(truncation.cut(snapped(needed, self.accepted) or needed), truncation.spectrum)
            asked *= 2


@dataclass(frozen=True)
class EnergyRank(SpectralRank):
    """The least rank that keeps ``share`` of Σσ².

    Attributes:
        share: of ‖ΔW‖²_F, above 0 and at most 1.
    """

    name = "energy"
    share: float
    limit: int
    first_guess: int = 16
    accepted: tuple[int, ...] = ()

    def rank_of(self, spectrum: Spectrum) -> int | None:
        """The least that keeps the share."""
        return spectrum.rank_for(self.share)


@dataclass(frozen=True)
class ErrorRank(SpectralRank):
    """The least rank whose relative error is at most ``bound``.

    Attributes:
        bound: of ‖ΔW − ΔW_rank‖_F / ‖ΔW‖_F, above 0 and below 1.
    """

    name = "error"
    bound: float
    limit: int
    first_guess: int = 16
    accepted: tuple[int, ...] = ()

    def rank_of(self, spectrum: Spectrum) -> int | None:
        """The least within the bound."""
        return spectrum.rank_within(self.bound)


@dataclass(frozen=True)
class BudgetRank(RankPolicy):
    """What a budget buys from, until it is spent and the module has a ``FixedRank``.

    Attributes:
        limit: min(d_out, d_in).
        depth: directions that a dense update is decomposed to; all those of a low-rank one are found at once.
    """

    name = "budget"
    limit: int
    depth: int

    @property
    def planned(self) -> None:
        """Known only once all modules are measured."""
        return None

    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """A low-rank update untouched, the leading ``depth`` directions of a dense one; with its spectrum."""
        if isinstance(update, LowRankUpdate):
            return Compressed(update, spectrum_of(update))
        return FixedRank(min(self.depth, self.limit)).compress(update, generator)

    def to_depth(self, depth: int) -> BudgetRank:
        """The same for ``depth`` directions, or for more where it is deeper already."""
        return replace(self, depth=max(self.depth, depth))
