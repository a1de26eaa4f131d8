from __future__ import annotations

import pytest
import torch

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import FactorSpace, SpaceParams
from mergekit_lowrank.strategies import RobustMerge
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, by_module, deviation, golden

VARIANTS = golden("robustmerge_*")


def strategy(reference: Golden) -> RobustMerge:
    p = reference.parameters
    params = RobustMerge.Params(density=p["mask_ratio"], unlifted=p["att_ratio"], factor=p["fuse_weight"])
    return RobustMerge(params)


def merged(reference: Golden, module: str, dtype: torch.dtype = torch.float32) -> LowRankUpdate:
    update = merge_updates(strategy(reference), FactorSpace(SpaceParams()), reference.updates(module, dtype))
    assert isinstance(update, LowRankUpdate)
    return update


@by_module(VARIANTS)
def test_robustmerge_gives_the_factors_of_the_reference(reference: Golden, module: str) -> None:
    update = merged(reference, module)
    assert deviation(update.a, reference.expected(f"lora_A.{module}")) <= reference.tolerance
    assert deviation(update.b, reference.expected(f"lora_B.{module}")) <= reference.tolerance


@by_module([g for g in VARIANTS if "16_" not in g.case])
def test_robustmerge_lifts_scales_as_the_reference_does(reference: Golden, module: str) -> None:
    rule = strategy(reference)
    density = reference.parameters["mask_ratio"]
    scales = []
    for update in reference.updates(module):
        ordered = update.a.abs().flatten().sort().values
        threshold = ordered[int(ordered.numel() * (1 - density)) - 1]
        pruned = torch.where(update.a.abs() >= threshold, update.a, 0)
        whole, left = (factor.abs().sum(dim=1).unsqueeze(0) for factor in (update.a, pruned))
        scales.append(rule.component_scales(whole, left, [update.rank])[0])
    assert deviation(torch.stack(scales), reference.expected(f"s_clamped.{module}")) <= max(reference.tolerance, 1e-6)


@by_module([g for g in VARIANTS if "16_" not in g.case])
def test_robustmerge_in_float64_is_within_the_reference_tolerance_too(reference: Golden, module: str) -> None:
    update = merged(reference, module, torch.float64)
    expected = reference.expected(f"lora_B.{module}").double() @ reference.expected(f"lora_A.{module}").double()
    assert update.b.dtype == torch.float64
    assert deviation(densify(update), expected) <= 3 * reference.tolerance


@pytest.mark.parametrize("case", ["robustmerge_bf16_T3_r8", "robustmerge_fp16_T3_r8"])
def test_half_precision_cases_really_hold_half_precision_inputs(case: str) -> None:
    (reference,) = golden(case)
    expected = torch.bfloat16 if "bf16" in case else torch.float16
    assert {t.dtype for name, t in reference.tensors.items() if name.startswith("lora_")} == {expected}


@by_module([g for g in VARIANTS if "prunedrow" in g.case])
def test_wholly_pruned_rows_follow_the_sane_rule_and_not_the_nan_of_the_reference(
    reference: Golden, module: str
) -> None:
    assert not reference.variant["is_reference_output"]
    update = merged(reference, module)
    assert bool(densify(update).isfinite().all())
