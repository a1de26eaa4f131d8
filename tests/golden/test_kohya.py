"""kohya's ``svd_merge_lora``: the weighted sum, cut to a rank."""

from __future__ import annotations

from mergekit_lowrank.lowrank import densify, factorise
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.strategies import Linear, keyed_generator
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, golden


@by_module(golden("kohya_svd_T3"))
def test_a_sum_cut_to_a_rank_gives_the_delta_of_kohya(reference: Golden, module: str) -> None:
    strategy = Linear(Linear.Params(normalize=False))
    merged = merge_updates(strategy, DeltaSpace(SpaceParams()), reference.updates(module), reference.weights)
    rank = reference.parameters["new_rank"]
    found = densify(factorise(merged, rank, keyed_generator(0)).cut(rank))
    assert deviation(found, reference.expected(f"delta.{module}")) <= reference.tolerance
