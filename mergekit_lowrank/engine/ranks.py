"""Output ranks, as far as the headers tell them: each module's policy, the ranks that may be written, what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mergekit_lowrank.engine.settings import Settings
from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.policies import (
    VLLM_RANKS,
    BudgetRank,
    EnergyRank,
    ErrorRank,
    FixedRank,
    RankPolicy,
    WholeRank,
    least_rank,
    snapped,
)
from mergekit_lowrank.recipe import Budget, Energy, ErrorBound, Recipe
from mergekit_lowrank.spaces import ModuleShape

__all__ = ["above_accepted", "accepted_ranks", "over_accepted", "rank_policy", "under_budget", "uniform_rank"]


def accepted_ranks(recipe: Recipe) -> tuple[int, ...]:
    """The ranks that may be written, ascending; empty for all."""
    snap, target = recipe.output.snap, recipe.output.target
    if snap is None and target is not None:
        from mergekit_lowrank.servers import SERVERS

        return SERVERS[target].accepted_ranks
    return VLLM_RANKS if snap == "vllm" else snap or ()


def rank_policy(
    settings: Settings, shape: ModuleShape, recipe: Recipe, largest_rank: int, *, is_factored: bool = True
) -> RankPolicy:
    """How one module is cut.

    Args:
        settings: of the module.
        shape: of the module.
        recipe: whether ranks are uniform, and which are accepted.
        largest_rank: over all inputs and modules.
        is_factored: whether an adapter stores it as factors.

    Raises:
        RecipeError: a dense update becomes an adapter, and nothing says of which rank.
    """
    if not is_factored or (recipe.output.kind == "model" and not settings.is_rank_given):
        return WholeRank()
    if shape.dense and not settings.is_rank_given:
        raise RecipeError(
            "its update has full rank, as of DoRA and of fine-tunes, so an adapter of it is an approximation; say "
            "output.rank: a number, {energy: 0.99} or {error: 0.01}, or write output: {kind: model}, which is exact"
        )
    limit, guess, asked = min(shape.d_out, shape.d_in), max(shape.ranks), settings.rank
    if settings.group.strategy.keeps_factors:  # even where they have more components than the update can have ranks
        limit = max(limit, settings.group.space.merged_rank(shape))
    # What is written anyway is used, unless a rule cuts a module below the one rank of a uniform output.
    uniform, own = recipe.output.uniform_rank, settings.has_own_rank
    accepted = () if uniform and own else accepted_ranks(recipe)
    match asked:
        case Energy():
            return EnergyRank(asked.energy, limit, guess, accepted)
        case ErrorBound():
            return ErrorRank(asked.error, limit, guess, accepted)
        case Budget():
            return BudgetRank(limit, guess)
        case "sum":
            rank = min(shape.joint_rank, settings.group.space.merged_rank(shape))
        case "max":
            rank = largest_rank if uniform and not own else guess
        case int():
            rank = asked
    rank = min(rank, limit)
    return FixedRank(min(snapped(rank, accepted) or rank, limit))


def uniform_rank(recipe: Recipe, policies: Iterable[RankPolicy]) -> int | None:
    """The rank that every module is padded to; None where ranks differ or depend on the data."""
    ranks = [policy.planned for policy in policies]
    if not recipe.output.uniform_rank or None in ranks:
        return None
    return snapped(max(rank for rank in ranks if rank is not None), accepted_ranks(recipe))


def over_accepted(recipe: Recipe, policies: Mapping[str, RankPolicy]) -> Iterator[RecipeError]:
    """The problem of planned ranks that no accepted one can hold, if there are any; by the largest of them."""
    accepted = accepted_ranks(recipe)
    planned = {name: policy.planned for name, policy in policies.items() if policy.planned is not None}
    large = {name: rank for name, rank in planned.items() if snapped(rank, accepted) is None}
    if large:
        worst = max(large, key=lambda name: large[name])
        more = f" (and {len(large) - 1} more modules)" if len(large) > 1 else ""
        yield above_accepted(recipe, large[worst], f"'{worst}'{more}")


def above_accepted(recipe: Recipe, rank: int, module: str) -> RecipeError:
    """The error of a module whose rank is above every accepted one."""
    largest = accepted_ranks(recipe)[-1]
    return recipe.problem(
        ("output", "snap"),
        f"module {module} has rank {rank}, and the largest accepted rank is {largest}; "
        f"set output.rank to {largest} or less, or leave snap out",
    )


def under_budget(recipe: Recipe, modules: Sequence[tuple[RankPolicy, int]]) -> Iterator[RecipeError]:
    """The problem of a budget that does not hold the least ranks.

    Args:
        recipe: with a budget or without.
        modules: the policy of each, and the bytes of one direction as stored.
    """
    budget, accepted = recipe.output.rank, accepted_ranks(recipe)
    if not isinstance(budget, Budget):
        return
    first = least_rank(accepted)
    least = sum((snapped(policy.planned or first, accepted) or 0) * size for policy, size in modules)
    if budget.bytes < least:
        message = f"{budget.bytes:,} bytes are too few: rank {first} in every module (or what a rule gives it) takes "
        yield recipe.problem(("output", "rank"), f"{message}{least:,}; give at least that")
