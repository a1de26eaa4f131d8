from __future__ import annotations

from typing import Any

import pytest
import torch
from mergekit_lowrank_spectral import Cart, IsoC, IsoCts, Tsv

from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import CoreSpace, SpaceParams
from mergekit_lowrank.strategies import Strategy
from mergekit_lowrank.testing import merge_updates
from tests.golden.cases import Golden, deviation, golden, header_of

FULL = {
    "tsv_m": lambda p: Tsv(Tsv.Params()),
    "tsv_m_lossless": lambda p: Tsv(Tsv.Params(rank_share=1.0)),
    "iso_c": lambda p: IsoC(IsoC.Params()),
    "iso_cts": lambda p: IsoCts(IsoCts.Params(common_space_fraction=p["common_space_fraction"])),
}


def strategy_of(p: dict[str, Any]) -> Strategy | None:
    """The method of a variant; None for those of other tests."""
    if "function" in p:
        return FULL[p["function"]](p)
    if "cart_pruning_rank" in p:
        return Cart(Cart.Params(rank_fraction=p["cart_pruning_rank"], departure_factor=p["cart_scaling_coeffs"]))
    if p["merge_method"] == "tsv":
        return Tsv(Tsv.Params())
    if p["merge_method"] == "tv" and p["isotropize"]:
        return IsoC(IsoC.Params())
    return None


CASES = golden("core_*", "tsv_iso_full_*", where=lambda p: strategy_of(p) is not None)
MATRICES = [(g, m) for g in CASES for m in g.modules if g.expected(f"delta.{m}").dim() == 2]


def by_matrix(kind: str) -> pytest.MarkDecorator:
    """Case × variant × module; the references average what is no matrix."""
    cases = [pytest.param(g, m, id=f"{g.id}-{m}") for g, m in MATRICES if g.has(f"delta.{m}", kind)]
    return pytest.mark.parametrize(("reference", "module"), cases)


def deviation_of(reference: Golden, module: str, kind: str, dtype: torch.dtype) -> float:
    strategy = strategy_of(reference.parameters)
    assert strategy is not None
    merged = merge_updates(strategy, CoreSpace(SpaceParams()), reference.updates(module, dtype), reference.weights)
    found = densify(merged) * reference.parameters.get("scaling_coeffs", 1.0)
    return deviation(found, reference.expected(f"delta.{module}", kind))


@by_matrix("expected")
def test_spectral_methods_give_the_delta_of_the_authors_code(reference: Golden, module: str) -> None:
    assert deviation_of(reference, module, "expected", torch.float32) <= reference.tolerance


@by_matrix("expected_f64")
def test_in_float64_they_agree_to_nine_digits(reference: Golden, module: str) -> None:
    # The lossless variant accumulates in float32 whatever its inputs are.
    lossless = reference.variant["id"] == "tsv_m_lossless"
    tolerance = header_of(reference.case)["expected_f64_tolerance"] if lossless else 1e-9
    assert deviation_of(reference, module, "expected_f64", torch.float64) <= tolerance


def test_the_cases_cover_every_method_that_has_a_reference() -> None:
    found = {strategy.name for g in CASES if (strategy := strategy_of(g.parameters))}
    assert found == {"tsv", "iso_c", "iso_cts", "cart"}
