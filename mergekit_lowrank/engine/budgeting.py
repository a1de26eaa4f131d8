"""A budget of bytes, spent before the first module is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_lowrank.engine.merging import merge_inputs, rank_generator
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.surveying import Rounds
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.policies import BudgetRank, Compressed, FixedRank, Offer, spread
from mergekit_lowrank.strategies import Survey

__all__ = ["spend_budget"]


@dataclass(frozen=True)
class _Directions:
    """What is known of a module's directions.

    Attributes:
        energies: σ² of those above rounding, descending.
        are_all: whether there are no others.
    """

    energies: tuple[float, ...]
    are_all: bool

    @classmethod
    def of(cls, compressed: Compressed) -> _Directions:
        """Those of a spectrum; of a partial one no more than were asked for, as the others are not exact."""
        spectrum = compressed.spectrum
        known = spectrum.resolved if spectrum.complete else min(spectrum.resolved, compressed.update.rank)
        return cls(tuple(spectrum.values[:known].square().tolist()), spectrum.complete)

    def has_sold_out(self, rank: int) -> bool:
        """Whether a budget that bought ``rank`` of them might buy more, were they known."""
        return rank >= len(self.energies) and not self.are_all


def spend_budget(
    plan: Plan, budget_bytes: int, surveys: Mapping[str, Survey], rounds: Rounds, device: torch.device
) -> Plan:
    """The plan with the rank that the budget buys in each module that has none yet.

    Each of these is merged, and only its singular values are kept. Of a dense result they are found to twice the rank
    that the budget buys on average; where it buys all that are found, the module is merged again for twice as many.
    """
    sizes = {module.name: module.bytes_per_rank(plan.out_dtype) for module in plan.modules}
    left = budget_bytes - sum(sizes[module.name] * (plan.written_rank(module) or 0) for module in plan.modules)
    policies = {module.name: module.rank for module in plan.modules if isinstance(module.rank, BudgetRank)}
    modules = [module for module in plan.modules if module.name in policies]
    mean = left // sum(sizes[name] for name in policies) if policies else 0
    policies = {name: policy.to_depth(2 * mean) for name, policy in policies.items()}

    def measure(module: ModulePlan, stored: Sequence[LowRankUpdate]) -> _Directions:
        merged = merge_inputs(plan, module, stored, device, surveys.get(module.group.key))
        return _Directions.of(policies[module.name].compress(merged.update, rank_generator(plan, module)))

    known: dict[str, _Directions] = {}
    ranks: dict[str, int] = {}
    asked = modules
    while asked:
        known |= {module.name: directions for module, directions in rounds.run(asked, measure)}
        offers = [Offer(known[module.name].energies, sizes[module.name]) for module in modules]
        bought = spread(offers, left, plan.accepted_ranks)
        ranks = {module.name: rank for module, rank in zip(modules, bought, strict=True)}
        asked = [module for module in modules if known[module.name].has_sold_out(ranks[module.name])]
        policies |= {m.name: policies[m.name].to_depth(2 * policies[m.name].depth) for m in asked}
    return replace(plan, modules=tuple(_with_rank(m, ranks[m.name]) if m.name in ranks else m for m in plan.modules))


def _with_rank(module: ModulePlan, rank: int) -> ModulePlan:
    return replace(module, rank=FixedRank(min(rank, module.shape.d_out, module.shape.d_in)))
