"""mergekit's ``sce``."""

from __future__ import annotations

from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.strategies import Sce
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, either_way, golden

DELTA = DeltaSpace(SpaceParams())


@either_way
@by_module(golden("mergekit_geometric_*", where=lambda p: p["mergekit_method"] == "sce"))
def test_sce_gives_the_weights_of_mergekit(reference: Golden, module: str, dense: bool) -> None:
    strategy = Sce(Sce.Params(select_topk=reference.parameters["select_topk"]))
    merged = merge_updates(strategy, DELTA, reference.given(module, dense=dense), reference.weights)
    found = reference.tensors[f"base.{module}"] + densify(merged)
    assert deviation(found, reference.expected(f"merged.{module}")) <= reference.tolerance
