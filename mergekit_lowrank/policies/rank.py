"""How a merged update becomes an adapter of some rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from mergekit_lowrank.lowrank import LowRankUpdate, Spectrum, Update, factorise, spectrum_of

__all__ = ["Compressed", "EnergyRank", "FixedRank", "RankPolicy"]


@dataclass(frozen=True, eq=False)
class Compressed:
    """An update as it will be written, and what it cost.

    Attributes:
        update: low-rank.
        spectrum: of the update before it was cut.
    """

    update: LowRankUpdate
    spectrum: Spectrum

    @property
    def kept_energy(self) -> float:
        """Share of ‖ΔW‖²_F that was kept."""
        return self.spectrum.kept(self.update.rank)


class RankPolicy(ABC):
    """Decides the rank of one module."""

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
class EnergyRank(RankPolicy):
    """The least rank that keeps ``share`` of Σσ², never more than ``limit``.

    Attributes:
        share: of ‖ΔW‖²_F, above 0 and at most 1.
        limit: min(d_out, d_in).
        first_guess: directions a large dense update is first decomposed to; doubled until the share is reached.
    """

    share: float
    limit: int
    first_guess: int = 16

    @property
    def planned(self) -> None:
        """Known only once the module is merged."""
        return None

    def compress(self, update: Update, generator: torch.Generator) -> Compressed:
        """The leading directions that keep the share; at least one."""
        asked = self.first_guess
        state = generator.get_state()
        while True:
            generator.set_state(state)  # the same start whatever was tried before
            truncation = factorise(update, min(asked, self.limit), generator)
            rank = truncation.spectrum.rank_for(self.share)
            if rank is not None or asked >= self.limit:
                # A zero update needs rank 0 and gets one direction; a share that is never reached takes all.
                return Compressed(truncation.cut(self.limit if rank is None else max(1, rank)), truncation.spectrum)
            asked *= 2
