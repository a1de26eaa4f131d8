"""mergekit's interpolations and means, on whole weights and on differences to a base.

Its SLERP, Karcher mean and Linear, and the others without a base, work on whole weights: those are the updates here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.strategies import Karcher, Linear, ModelStock, MultiSlerp, NuSlerp, Slerp, Strategy
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, either_way, golden

VARIANTS = golden("mergekit_geometric_*", where=lambda p: p["mergekit_method"] != "sce")
METHODS = {
    "linear": Linear,
    "slerp": Slerp,
    "nuslerp": NuSlerp,
    "multislerp": MultiSlerp,
    "karcher": Karcher,
    "model_stock": ModelStock,
}
GRANULARITY = {
    # (flatten, row_wise): mergekit's row_wise takes columns as the vectors.
    (True, False): "tensor",
    (False, False): "row",
    (False, True): "column",
}


def strategy(reference: Golden) -> Strategy:
    p = dict(reference.parameters)
    method = METHODS[p.pop("mergekit_method")]
    p.pop("with_base", None)
    if method is NuSlerp:
        p["granularity"] = GRANULARITY[p.pop("flatten", True), p.pop("row_wise", False)]
    if method is ModelStock:
        p["granularity"] = "row" if p.pop("filter_wise") else "tensor"
    return method(method.Params(**p))


def has_base(reference: Golden) -> bool:
    return reference.parameters["mergekit_method"] == "model_stock" or reference.parameters.get("with_base", False)


def inputs(reference: Golden, module: str, dense: bool) -> Sequence[InputUpdate]:
    """Whole weights, or their differences to the base; SLERP and NuSLERP have the first two."""
    count = 2 if "slerp" in reference.id and "multi" not in reference.id else reference.inputs
    if has_base(reference):
        return reference.given(module, dense=dense)[:count]
    weights = [reference.tensors[f"full.{t}.{module}"] for t in range(count)]
    if dense:
        return [StreamedUpdate.of(weight) for weight in weights]
    return [LowRankUpdate(weight, torch.eye(weight.shape[1])) for weight in weights]


def merged(reference: Golden, module: str, dense: bool) -> Tensor:
    updates = inputs(reference, module, dense)
    found = densify(
        merge_updates(strategy(reference), DeltaSpace(SpaceParams()), updates, reference.variant["weights"])
    )
    return found + reference.tensors[f"base.{module}"] if has_base(reference) else found


@either_way
@by_module(VARIANTS)
def test_interpolations_and_means_give_the_weights_of_mergekit(reference: Golden, module: str, dense: bool) -> None:
    assert deviation(merged(reference, module, dense), reference.expected(f"merged.{module}")) <= reference.tolerance
