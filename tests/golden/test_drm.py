from __future__ import annotations

import torch

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import JointParams, JointSpace
from mergekit_lowrank.strategies import Drm
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, golden, header_of

VARIANTS = golden("drm_lora_*", "drm_zero_task_T3")


def merged(reference: Golden, module: str, dtype: torch.dtype) -> LowRankUpdate:
    p = reference.parameters
    strategy = Drm(Drm.Params(density=1 - p["singular_matrices_drop_rate"], disjoint_mean=p["enable_disjoint_mean"]))
    space = JointSpace(JointParams(direction=p["direction"], **Drm.space_defaults))
    update = merge_updates(strategy, space, reference.updates(module, dtype), reference.weights)
    assert isinstance(update, LowRankUpdate)
    return update


@by_module(VARIANTS)
def test_drm_gives_the_delta_of_the_reference(reference: Golden, module: str) -> None:
    delta = densify(merged(reference, module, torch.float32))
    assert deviation(delta, reference.expected(f"delta.{module}")) <= reference.tolerance


@by_module([g for g in VARIANTS if "expected_f64_tolerance" in header_of(g.case)])
def test_drm_in_float64_gives_the_delta_of_the_reference_to_nine_digits(reference: Golden, module: str) -> None:
    delta = densify(merged(reference, module, torch.float64))
    tolerance = header_of(reference.case)["expected_f64_tolerance"]
    assert tolerance <= 1e-9
    assert deviation(delta, reference.expected(f"delta.{module}", "expected_f64")) <= tolerance


@by_module([g for g in VARIANTS if "zero_task" in g.case])
def test_drm_with_a_zero_task_agrees_with_the_suggested_result_in_float64(reference: Golden, module: str) -> None:
    assert not reference.variant["is_reference_output"]
    delta = densify(merged(reference, module, torch.float64))
    # The suggested result was computed from deltas that had been multiplied out in float32.
    assert deviation(delta, reference.expected(f"delta.{module}")) <= 1e-7
