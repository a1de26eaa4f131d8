"""A budget of bytes, spent before the first module is merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mergekit_lowrank.engine.merging import Encodings, merge_inputs, rank_generator
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.surveying import Measure, Rounds
from mergekit_lowrank.policies import BudgetRank, Compressed, FixedRank, Offer, spread
from mergekit_lowrank.strategies import Survey

__all__ = ["buys_ranks", "spend_budget", "with_ranks"]


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
        known = spectrum.resolved if spectrum.complete else min(spectrum.resolved, compressed.factors.rank)
        return cls(tuple(spectrum.values[:known].square().tolist()), spectrum.complete)

    def has_sold_out(self, rank: int) -> bool:
        """Whether a budget that bought ``rank`` of them might buy more, were they known."""
        return rank >= len(self.energies) and not self.are_all


class _Priced(Measure[_Directions]):
    """The directions of a merged module."""

    def __init__(self, plan: Plan, policies: Mapping[str, BudgetRank], surveys: Mapping[str, Survey]) -> None:
        self._plan, self._policies, self._surveys = plan, policies, surveys

    def __call__(self, module: str, encodings: Encodings) -> _Directions:
        own = self._plan.module(module)
        merged = merge_inputs(self._plan, own, encodings, self._surveys.get(own.group.key))
        return _Directions.of(self._policies[module].compress(merged.update, rank_generator(self._plan, own)))


def buys_ranks(plan: Plan) -> bool:
    """Whether a budget is to be spent before ranks are known."""
    return any(isinstance(module.rank, BudgetRank) for module in plan.modules)


def spend_budget(plan: Plan, surveys: Mapping[str, Survey], rounds: Rounds) -> dict[str, int]:
    """The rank that the budget buys in each module that has none yet, by name.

    Each of these is merged, and only its singular values are kept. Of a dense result they are found to twice the rank
    that the budget buys on average; where it buys all that are found, the module is merged again for twice as many.
    """
    sizes = {module.name: module.bytes_per_rank(plan.out_dtype) for module in plan.modules}
    spent = sum(sizes[module.name] * (plan.written_rank(module) or 0) for module in plan.modules)
    left = (plan.budget_bytes or 0) - spent
    policies = {module.name: module.rank for module in plan.modules if isinstance(module.rank, BudgetRank)}
    modules = [module for module in plan.modules if module.name in policies]
    mean = left // sum(sizes[name] for name in policies) if policies else 0
    policies = {name: policy.to_depth(2 * mean) for name, policy in policies.items()}
    known: dict[str, _Directions] = {}
    ranks: dict[str, int] = {}
    asked = modules
    while asked:
        known |= dict(rounds.run([module.name for module in asked], _Priced(plan, policies, surveys)))
        offers = [Offer(known[module.name].energies, sizes[module.name]) for module in modules]
        bought = spread(offers, left, plan.accepted_ranks)
        ranks = {module.name: rank for module, rank in zip(modules, bought, strict=True)}
        asked = [module for module in modules if known[module.name].has_sold_out(ranks[module.name])]
        policies |= {m.name: policies[m.name].to_depth(2 * policies[m.name].depth) for m in asked}
    return ranks


def with_ranks(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """The plan with these ranks in the modules that they name."""
    return replace(plan, modules=tuple(_with_rank(m, ranks[m.name]) if m.name in ranks else m for m in plan.modules))


def _with_rank(module: ModulePlan, rank: int) -> ModulePlan:
    return replace(module, rank=FixedRank(min(rank, module.shape.d_out, module.shape.d_in)))
