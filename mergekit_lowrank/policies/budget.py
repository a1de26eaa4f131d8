"""A number of bytes, spread over modules where it keeps most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lowrank.policies.rank import snapped

__all__ = ["Offer", "least_rank", "spread"]


@dataclass(frozen=True)
class Offer:
    """What a budget may buy of one module.

    Attributes:
        energies: σ² of its directions, descending.
        bytes_per_rank: what a direction costs: a column of B and a row of A, as stored.
    """

    energies: tuple[float, ...]
    bytes_per_rank: int

    def step(self, rank: int, accepted: Sequence[int]) -> tuple[float, int] | None:
        """Energy for each byte of the step beyond ``rank``, and the rank it leads to; None where nothing is gained."""
        reached = snapped(rank + 1, accepted)
        gained = sum(self.energies[rank:reached])
        if reached is None or not gained > 0:
            return None
        return gained / ((reached - rank) * self.bytes_per_rank), reached


def least_rank(accepted: Sequence[int]) -> int:
    """The rank that a module gets whatever the budget: 1, or the least accepted one."""
    return accepted[0] if accepted else 1


def spread(offers: Sequence[Offer], budget_bytes: int, accepted: Sequence[int] = ()) -> list[int]:
    """The rank of each module: the steps that keep most energy for each byte come first, while they fit.

    A step leads to the next rank, or to the next accepted one, rows that will be zeros included. Every module has its
    least rank; one whose next step does not fit grows no further. Equal ratios go by the order of the modules, then of
    their directions. The energy kept is the most that the budget can buy, but for less than one step: the first that
    did not fit (the ratios of one module fall, so this is the greedy solution of a knapsack; Dantzig 1957).

    Args:
        offers: one for each module.
        budget_bytes: no less than the least ranks cost.
        accepted: ranks that may be written, ascending; empty for all.
    """
    ranks = [least_rank(accepted)] * len(offers)
    left = budget_bytes - sum(rank * offer.bytes_per_rank for rank, offer in zip(ranks, offers, strict=True))
    waiting: list[tuple[float, int, int]] = []

    def queue(module: int) -> None:
        step = offers[module].step(ranks[module], accepted)
        if step is not None:
            heapq.heappush(waiting, (-step[0], module, step[1]))

    for module in range(len(offers)):
        queue(module)
    while waiting:
        _, module, rank = heapq.heappop(waiting)
        cost = (rank - ranks[module]) * offers[module].bytes_per_rank
        if cost <= left:
            left, ranks[module] = left - cost, rank
            queue(module)
    return ranks
