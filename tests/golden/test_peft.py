"""peft's ``add_weighted_adapter``.

peft copies ``use_rslora`` to the merged adapter, whose scaling is then √rank and not 1: those deltas are too large by
exactly that factor, which ``info.new_scaling`` records and these tests divide out.
"""

from __future__ import annotations

from mergekit_lowrank.lowrank import LowRankUpdate, Update, densify, factorise
from mergekit_lowrank.spaces import DeltaSpace, FactorSpace, Space, SpaceParams
from mergekit_lowrank.strategies import Linear, Strategy, Ties, keyed_generator
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, golden

VARIANTS = golden("peft_*", where=lambda p: "magnitude_prune" not in p["combination_type"])
IN_FACTORS = [g for g in VARIANTS if g.parameters["combination_type"] in {"linear", "ties"}]


def strategy(reference: Golden) -> Strategy:
    p = reference.parameters
    if "ties" not in p["combination_type"]:
        return Linear(Linear.Params(normalize=False))
    return Ties(
        Ties.Params(
            density=p["density"],
            inclusive=False,
            weighted_election=False,
            divisor="count",
            zero_sign="positive",
            elect=p.get("majority_sign_method", "total"),
        )
    )


def merged(reference: Golden, module: str) -> Update:
    in_factors = reference.parameters["combination_type"] in {"linear", "ties"}
    space: Space = FactorSpace(SpaceParams()) if in_factors else DeltaSpace(SpaceParams())
    update = merge_updates(strategy(reference), space, reference.updates(module), reference.weights)
    rank = reference.variant["info"]["new_rank"]
    return factorise(update, rank, keyed_generator(0)).cut(rank) if "svd" in reference.variant["id"] else update


@by_module(VARIANTS)
def test_every_combination_type_gives_the_delta_of_peft(reference: Golden, module: str) -> None:
    expected = reference.expected(f"delta.{module}") / reference.variant["info"]["new_scaling"]
    assert deviation(densify(merged(reference, module)), expected) <= reference.tolerance


@by_module(IN_FACTORS)
def test_linear_and_ties_in_factors_give_the_factors_of_peft(reference: Golden, module: str) -> None:
    update = merged(reference, module)
    assert isinstance(update, LowRankUpdate)
    assert deviation(update.a, reference.expected(f"lora_A.{module}")) <= reference.tolerance
    assert deviation(update.b, reference.expected(f"lora_B.{module}")) <= reference.tolerance


@by_module([g for g in VARIANTS if g.parameters["combination_type"] == "cat"])
def test_the_concatenation_of_peft_has_the_same_rank_and_stacks_the_same_a(reference: Golden, module: str) -> None:
    update = merged(reference, module)
    assert isinstance(update, LowRankUpdate)
    expected = reference.expected(f"lora_A.{module}")
    assert update.a.shape == expected.shape
    # peft multiplies A by weight and scaling, this package B: each row is the same direction.
    cosines = (update.a * expected).sum(dim=1) / (update.a.norm(dim=1) * expected.norm(dim=1))
    assert deviation(cosines.abs(), cosines.new_ones(cosines.shape)) <= 1e-6
