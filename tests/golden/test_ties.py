from __future__ import annotations

import pytest

from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import CoreSpace, DeltaSpace, JointParams, JointSpace, Space, SpaceParams
from mergekit_lowrank.strategies import Linear, Strategy, Ties
from mergekit_lowrank.testing import merge_modules, merge_updates
from tests.golden.cases import Golden, by_module, deviation, either_way, golden

MERGEKIT = golden(
    "mergekit_gta_T3", where=lambda p: p["mergekit_method"] in {"ties", "task_arithmetic"} and not p.get("rescale")
)


@either_way
@by_module(golden("ties_orig_*"))
def test_model_wide_ties_gives_the_delta_of_the_paper_code(reference: Golden, module: str, dense: bool) -> None:
    p = reference.parameters
    density = p["reset_thresh"] / 100 if p["reset_thresh"] > 1 else p["reset_thresh"]
    params = Ties.Params(density=density, scope="model", disjoint=p["merge_func"].removeprefix("dis-"))
    updates = reference.all_given(dense=dense)
    merged = merge_modules(Ties(params), DeltaSpace(SpaceParams()), updates, reference.weights)
    expected = reference.expected(f"delta.{module}")
    found = densify(merged[module]).reshape(expected.shape) * p["lambda"]
    assert deviation(found, expected) <= reference.tolerance


@either_way
@by_module(golden("knots_*"))
def test_model_wide_ties_in_joint_space_gives_the_delta_of_knots(reference: Golden, module: str, dense: bool) -> None:
    p = reference.parameters
    direction = "horizontal" if p.get("concat_across_output", True) else "vertical"
    strategy = Ties(Ties.Params(density=p["topK"] / 100, scope="model", disjoint=p["merging_type"]))
    space = JointSpace(JointParams(direction=direction))
    merged = merge_modules(strategy, space, reference.all_given(dense=dense), reference.weights)
    found = densify(merged[module]) * p["scaling_coeffs"]
    assert deviation(found, reference.expected(f"delta.{module}")) <= reference.tolerance


def core_strategy(reference: Golden) -> Strategy:
    p = reference.parameters
    if p["merge_method"] == "ties":
        return Ties(Ties.Params(density=p["topK"] / 100))
    return Linear(Linear.Params(normalize=p["merge_method"] == "mean"))


@by_module(
    golden(
        "core_*",
        where=lambda p: (
            p["merge_method"] in {"tv", "mean", "ties"} and not p["isotropize"] and p["merge_space"] != "knots"
        ),
    )
)
def test_core_space_gives_the_delta_of_the_reference(reference: Golden, module: str) -> None:
    p = reference.parameters
    in_core = p.get("merge_space", "core") == "core"
    space: Space = CoreSpace(SpaceParams()) if in_core else DeltaSpace(SpaceParams())
    merged = merge_updates(core_strategy(reference), space, reference.updates(module), reference.weights)
    found = densify(merged) * p["scaling_coeffs"]
    assert deviation(found, reference.expected(f"delta.{module}")) <= reference.tolerance


def mergekit_strategy(reference: Golden) -> Strategy:
    p = reference.parameters
    if p["mergekit_method"] == "task_arithmetic":
        return Linear(Linear.Params(normalize=p.get("normalize", False)))
    disjoint = "mean" if p.get("normalize", True) else "sum"
    return Ties(
        Ties.Params(density=p["density"], inclusive=False, divisor="weights", zero_sign="positive", disjoint=disjoint)
    )


@either_way
@by_module(MERGEKIT)
def test_linear_and_ties_give_the_weights_of_mergekit(reference: Golden, module: str, dense: bool) -> None:
    updates = reference.given(module, dense=dense)
    merged = merge_updates(mergekit_strategy(reference), DeltaSpace(SpaceParams()), updates, reference.weights)
    found = reference.tensors[f"base.{module}"] + densify(merged) * reference.parameters.get("lambda", 1.0)
    assert deviation(found, reference.expected(f"merged.{module}")) <= reference.tolerance


@pytest.mark.parametrize("variant", ["ties_d0p5_neg"])
def test_the_mergekit_cases_include_negative_weights(variant: str) -> None:
    assert min(next(g for g in MERGEKIT if g.variant["id"] == variant).weights) < 0
