"""mergekit's sparsify-and-merge methods and peft's ``magnitude_prune``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, Update, densify, factorise
from mergekit_lowrank.spaces import DeltaSpace, FactorSpace, Space, SpaceParams
from mergekit_lowrank.strategies import (
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    MagnitudePrune,
    Strategy,
    Ties,
    keyed_generator,
    stages,
)
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, either_way, golden

DELTA = DeltaSpace(SpaceParams())
ELECTED = {"ties": Ties, "breadcrumbs_ties": BreadcrumbsTies, "dare_ties": DareTies, "della": Della}
SUMMED = {"breadcrumbs": Breadcrumbs, "dare_linear": DareLinear, "della_linear": DellaLinear}
AVERAGED = {"ties", "della"}
"""What mergekit normalises by default."""
RESCALED = {"dare_linear", "dare_ties", "della", "della_linear"}
"""What mergekit rescales by default, to the L1 norm."""

MERGEKIT = golden("mergekit_gta_T3", where=lambda p: p["mergekit_method"] != "task_arithmetic")
RANDOM = golden("mergekit_random_given_uniform_T3")


def mergekit_strategy(p: dict[str, Any]) -> Strategy:
    method = p["mergekit_method"]
    chosen: dict[str, Any] = {name: p[name] for name in ("density", "gamma", "epsilon") if name in p}
    chosen["rescale"] = "norm" if p.get("rescale", method in RESCALED) else "none"
    if method in SUMMED:
        return SUMMED[method](SUMMED[method].Params(normalize=p.get("normalize", False), **chosen))
    if method == "ties":
        chosen["inclusive"] = False
    average = p.get("normalize", method in AVERAGED)
    disjoint = "mean" if average else "sum"
    kind = ELECTED[method]
    return kind(kind.Params(divisor="weights", zero_sign="positive", disjoint=disjoint, **chosen))


@either_way
@by_module(MERGEKIT)
def test_the_weights_of_mergekit(reference: Golden, module: str, dense: bool) -> None:
    updates = reference.given(module, dense=dense)
    merged = merge_updates(mergekit_strategy(reference.parameters), DELTA, updates, reference.weights)
    found = reference.tensors[f"base.{module}"] + densify(merged) * reference.parameters.get("lambda", 1.0)
    assert deviation(found, reference.expected(f"merged.{module}")) <= reference.tolerance


@either_way
@by_module(RANDOM)
def test_random_methods_with_given_random_numbers(
    reference: Golden, module: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = torch.stack([reference.tensors[f"uniform.{t}.{module}"] for t in range(reference.inputs)])
    drop = stages.drop_and_rescale

    def with_given(values: Tensor, probabilities: Tensor, uniform: Tensor, *, rescale: bool) -> Tensor:
        assert uniform.shape == given.shape
        return drop(values, probabilities, given, rescale=rescale)

    monkeypatch.setattr("mergekit_lowrank.strategies.sparsify.drop_and_rescale", with_given)
    updates = reference.given(module, dense=dense)
    merged = merge_updates(mergekit_strategy(reference.parameters), DELTA, updates, reference.weights)
    found = reference.tensors[f"base.{module}"] + densify(merged)
    assert deviation(found, reference.expected(f"merged.{module}")) <= reference.tolerance


@by_module([g for g in RANDOM if g.parameters["mergekit_method"].startswith("della")])
def test_the_probabilities_of_della(reference: Golden, module: str) -> None:
    strategy = mergekit_strategy(reference.parameters)
    assert isinstance(strategy, Della | DellaLinear)
    for t, update in enumerate(reference.updates(module)):
        densities = torch.full((1, 1, 1), reference.parameters["density"])
        found = strategy.sparsify.probabilities(densify(update)[None], densities, axis=0)[0]
        expected = reference.expected(f"keep_probability.{t}")
        torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=1e-6)


PRUNED = golden("peft_*", where=lambda p: "magnitude_prune" in p["combination_type"])


def pruned(reference: Golden, module: str) -> Update:
    p = reference.parameters
    space: Space = DELTA if "svd" in p["combination_type"] else FactorSpace(SpaceParams())
    strategy = MagnitudePrune(MagnitudePrune.Params(density=p["density"], inclusive=False))
    return merge_updates(strategy, space, reference.updates(module), reference.weights)


@by_module(PRUNED)
def test_magnitude_prune_gives_the_delta_of_peft(reference: Golden, module: str) -> None:
    update = pruned(reference, module)
    info = reference.variant["info"]
    if "svd" in reference.parameters["combination_type"]:
        update = factorise(update, info["new_rank"], keyed_generator(0)).cut(info["new_rank"])
    else:
        assert isinstance(update, LowRankUpdate)
    expected = reference.expected(f"delta.{module}") / info["new_scaling"]
    assert deviation(densify(update), expected) <= reference.tolerance
