"""DARE, DELLA, Breadcrumbs and magnitude pruning, against the formulas."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import DeltaSpace, FactorSpace, JointParams, JointSpace, SpaceParams
from mergekit_lowrank.spaces import base as spaces_base
from mergekit_lowrank.strategies import (
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    MagnitudePrune,
    MergeContext,
    Strategy,
    Ties,
)
from mergekit_lowrank.strategies.stages import drop_and_rescale, magnitude_ranks, trim_outliers
from mergekit_lowrank.testing import merge_modules, merge_updates, random_updates
from tests.strategies import dense

DELTA = DeltaSpace(SpaceParams())
RANDOM: list[type[Strategy]] = [DareLinear, DareTies, Della, DellaLinear]


def exactly(delta: Tensor) -> LowRankUpdate:
    return LowRankUpdate(delta, torch.eye(delta.shape[1], dtype=delta.dtype))


def merged(kind: type[Strategy], *deltas: Tensor, weights: list[float] | None = None, **parameters: Any) -> Tensor:
    strategy = kind(kind.Params(**parameters))
    return densify(merge_updates(strategy, DELTA, [exactly(d) for d in deltas], weights))


ROW = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]])


def test_magnitude_prune_by_hand() -> None:
    found = merged(MagnitudePrune, ROW, 2 * ROW, weights=[1.0, -1.0], density=0.2, inclusive=False)
    assert found.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, -9.0, 10.0]]


def test_an_average_of_what_is_kept() -> None:
    found = merged(MagnitudePrune, ROW, ROW, weights=[1.0, 3.0], density=0.1, inclusive=False, normalize=True)
    assert found.tolist() == [[0.0] * 9 + [-10.0]]


def test_breadcrumbs_by_hand() -> None:
    found = merged(Breadcrumbs, ROW, density=0.5, gamma=0.2)
    assert found.tolist() == [[0, 0, 0, -4.0, 5.0, -6.0, 7.0, -8.0, 0, 0]]


def test_a_gamma_below_one_entry_removes_no_outlier() -> None:
    # mergekit's slice [bottom:-0] is empty there and drops everything.
    assert merged(Breadcrumbs, ROW, density=0.3, gamma=0.05).tolist() == [[0] * 7 + [-8.0, 9.0, -10.0]]


def test_outliers_go_even_where_the_largest_entry_that_stays_is_zero() -> None:
    found = merged(Breadcrumbs, torch.tensor([[0.0] * 8 + [3.0, -4.0]]), density=0.5, gamma=0.2)
    assert not found.any()


def test_a_density_that_leaves_no_room_for_outliers_removes_fewer() -> None:
    assert merged(Breadcrumbs, ROW, density=0.9, gamma=0.5).tolist() == [[*ROW[0, :9].tolist(), 0]]
    assert merged(Breadcrumbs, ROW, density=1.0, gamma=0.5).tolist() == ROW.tolist()


@given(density=st.floats(0, 1), gamma=st.floats(0, 0.99), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_breadcrumbs_equal_a_sort(density: float, gamma: float, size: int, seed: int) -> None:
    delta = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = merged(Breadcrumbs, delta, density=density, gamma=gamma)
    np.testing.assert_array_equal(found.numpy(), dense.breadcrumbs(delta.numpy(), density, gamma))


def test_entries_of_equal_magnitude_at_a_threshold_are_all_kept() -> None:
    assert trim_outliers(torch.tensor([[1.0, -2.0, 2.0, 3.0]]), [2.0]).tolist() == [[1.0, -2.0, 2.0, 0.0]]


def test_rescaling_to_the_norm_restores_the_l1_norm_of_each_input() -> None:
    found = merged(MagnitudePrune, ROW, density=0.2, inclusive=False, rescale="norm")
    assert found.abs().sum() == pytest.approx(float(ROW.abs().sum()), rel=1e-6)
    assert found.tolist()[0][8] == pytest.approx(9 * 55 / 19)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("rescale", ["norm", "probability", "none"])
def test_random_methods_at_density_one_keep_everything(kind: type[Strategy], rescale: str) -> None:
    torch.testing.assert_close(merged(kind, ROW, density=1.0, rescale=rescale), ROW)


@pytest.mark.parametrize("kind", RANDOM)
def test_random_methods_at_density_zero_keep_what_the_probability_says(kind: type[Strategy]) -> None:
    parameters = {"epsilon": 0.0} if kind in (Della, DellaLinear) else {}
    assert merged(kind, ROW, density=0.0, **parameters).abs().max() == 0


@pytest.mark.parametrize("kind", [DareLinear, DellaLinear])
def test_the_mean_over_many_entries_stays(kind: type[Strategy]) -> None:
    ones = torch.linspace(0.5, 1.5, 10_000).view(10, 1000)
    found = merged(kind, ones, density=0.4)
    # Of 10,000 entries with variance at most (1/p − 1)·x² each, the mean is off by 6 deviations once in 1e9.
    assert float(found.mean()) == pytest.approx(1.0, abs=6 * (1.5 / 0.25) ** 0.5 * 1.5 / 100)
    kept = float((found != 0).float().mean())
    assert kept == pytest.approx(0.4, abs=0.03)


def test_what_is_kept_is_divided_by_its_own_probability() -> None:
    values = torch.tensor([[2.0, 2.0, 2.0]])
    probabilities = torch.tensor([[0.5, 0.25, 0.0]])
    uniform = torch.tensor([[0.4, 0.25, 0.0]])
    assert drop_and_rescale(values, probabilities, uniform).tolist() == [[4.0, 0.0, 0.0]]
    assert drop_and_rescale(values, probabilities, uniform, rescale=False).tolist() == [[2.0, 0.0, 0.0]]


def test_the_ranks_of_magnitudes_by_hand() -> None:
    found = magnitude_ranks(torch.tensor([[3.0, 0.0, -1.0, 2.0], [0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), dim=1)
    assert found.tolist() == [[1.0, 0.0, 0.0, 0.5], [0.5] * 4, [0.5] * 4]


@pytest.mark.parametrize("dim", [1, 2])
def test_ranks_do_not_depend_on_the_type_and_ties_go_by_place(dim: int) -> None:
    values = torch.randint(-3, 4, (3, 6, 7), generator=torch.Generator().manual_seed(1)).float()
    found = magnitude_ranks(values, dim=dim)
    torch.testing.assert_close(found.double(), magnitude_ranks(values.double(), dim=dim))
    assert magnitude_ranks(torch.tensor([[2.0, -2.0, 2.0]]), dim=1).tolist() == [[0.0, 0.5, 1.0]]


@given(rows=st.integers(1, 5), columns=st.integers(2, 9), seed=st.integers(0, 99))
def test_della_probabilities_equal_the_formula(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    strategy = Della(Della.Params(density=0.6, epsilon=0.2))
    found = strategy.sparsify.probabilities(delta[None], torch.full((1, 1, 1), 0.6), axis=0)[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.numpy(), dense.della_probabilities(delta.numpy(), 0.6, 0.2), atol=1e-6)


def test_probabilities_are_cut_to_the_unit_interval() -> None:
    strategy = Della(Della.Params(density=0.9, epsilon=0.3))
    found = strategy.sparsify.probabilities(ROW[None], torch.full((1, 1, 1), 0.9), axis=0)  # type: ignore[attr-defined]
    assert float(found.min()) == pytest.approx(0.6)
    assert float(found.max()) == 1.0


def masks(kind: type[Strategy], updates: list[LowRankUpdate], context: MergeContext, **parameters: Any) -> Tensor:
    coordinates = DELTA.encode(updates, context.weights)
    return densify(kind(kind.Params(**parameters)).merge(coordinates, context)) != 0


@pytest.mark.parametrize("kind", [DareLinear, DellaLinear])
def test_masks_are_keyed_by_seed_module_and_input_alone(kind: type[Strategy]) -> None:
    (update,) = random_updates(6, 50, [3])
    context = MergeContext("a.b", (2,), (1.0,), 1.0, seed=7)
    expected = masks(kind, [update], context)
    torch.manual_seed(999)
    assert torch.equal(masks(kind, [update], context), expected)
    for other in (
        MergeContext("a.c", (2,), (1.0,), 1.0, seed=7),
        MergeContext("a.b", (1,), (1.0,), 1.0, seed=7),
        MergeContext("a.b", (2,), (1.0,), 1.0, seed=8),
    ):
        assert not torch.equal(masks(kind, [update], other), expected)


def test_the_mask_of_an_input_does_not_depend_on_the_others() -> None:
    first, second = random_updates(6, 50, [3, 2])
    nothing = LowRankUpdate(torch.zeros(6, 1), torch.zeros(1, 50))
    alone = masks(DareLinear, [second], MergeContext("m", (1,), (1.0,), 1.0))
    beside = masks(DareLinear, [nothing, second], MergeContext("m", (0, 1), (1.0, 1.0), 2.0))
    assert torch.equal(beside, alone)
    assert first.shape == second.shape


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("entries", [1, 30, 64, 1 << 20])
def test_masks_do_not_depend_on_the_size_of_blocks(
    kind: type[Strategy], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = random_updates(9, 7, [2, 3], dtype=torch.float64)
    strategy = kind(kind.Params(rescale="norm"))
    expected = densify(merge_updates(strategy, DELTA, updates))
    monkeypatch.setattr(spaces_base, "BLOCK_ENTRIES", entries)
    torch.testing.assert_close(densify(merge_updates(strategy, DELTA, updates)), expected)


@pytest.mark.parametrize("entries", [1, 30, 64])
def test_masks_of_columns_do_not_depend_on_the_size_of_blocks(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = random_updates(9, 7, [2, 3], dtype=torch.float64)
    strategy, space = DareLinear(DareLinear.Params()), JointSpace(JointParams())
    expected = densify(merge_updates(strategy, space, updates))
    monkeypatch.setattr(spaces_base, "BLOCK_ENTRIES", entries)
    torch.testing.assert_close(densify(merge_updates(strategy, space, updates)), expected)


def test_the_masks_of_a_seed_never_change() -> None:
    found = merged(DareLinear, torch.ones(8, 32), density=0.5)
    digest = hashlib.sha256((found != 0).numpy().tobytes()).hexdigest()
    assert digest == "8a46b204b56e4fe723ace8838098decbe78d641c729781737ab8a7b37ac3cd60"


def test_a_and_b_have_masks_of_their_own() -> None:
    ones = LowRankUpdate(torch.ones(40, 40), torch.ones(40, 40))
    found = merge_updates(DareLinear(DareLinear.Params()), FactorSpace(SpaceParams()), [ones])
    assert isinstance(found, LowRankUpdate)
    assert not torch.equal(found.a != 0, found.b != 0)


def test_della_ranks_columns_where_blocks_are_columns() -> None:
    updates = random_updates(6, 40, [2, 3])
    space = JointSpace(JointParams())
    whole = densify(merge_updates(DellaLinear(DellaLinear.Params()), space, updates))
    assert bool(whole.isfinite().all())


@pytest.mark.parametrize("kind", [Ties, BreadcrumbsTies, MagnitudePrune, Breadcrumbs])
def test_model_scope_equals_flattening_all_modules(kind: type[Strategy]) -> None:
    modules = {"a": random_updates(6, 8, [2, 3], 1), "b": random_updates(5, 4, [1, 2], 2)}
    strategy = kind(kind.Params(scope="model", density=0.4))
    found = merge_modules(strategy, DELTA, modules, [1.0, 0.7])
    flat = [torch.cat([densify(modules[name][t]).flatten() for name in modules]).view(1, -1) for t in range(2)]
    expected = merged(kind, *flat, weights=[1.0, 0.7], density=0.4).flatten()
    torch.testing.assert_close(torch.cat([densify(found[name]).flatten() for name in modules]), expected)


def test_each_input_may_have_a_density_of_its_own_in_model_scope() -> None:
    params = Breadcrumbs.Params(scope="model", density=0.9, gamma=0.0)
    strategy, survey = Breadcrumbs(params), Breadcrumbs(params).survey()
    assert survey is not None
    context = MergeContext("m", (0, 1), (1.0, 1.0), 2.0, ({"density": 0.1}, {}), survey)
    coordinates = DELTA.encode([exactly(ROW), exactly(100 * ROW)], (1.0, 1.0))
    while survey.conclude(survey.measure(coordinates, context)):
        pass
    found = densify(strategy.merge(coordinates, context))
    assert found.tolist() == [[0.0, *(100 * ROW[0, 1:9]).tolist(), -1010.0]]


@pytest.mark.parametrize("kind", [DareLinear, DellaLinear, Breadcrumbs, MagnitudePrune])
def test_an_average_refuses_weights_that_sum_to_zero(kind: type[Strategy]) -> None:
    with pytest.raises(StrategyError, match="sum to 0"):
        kind(kind.Params(normalize=True)).check_weights([1.0, -1.0], 0.0)
    kind(kind.Params()).check_weights([1.0, -1.0], 0.0)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [(DareLinear, {"density": 1.1}), (Della, {"epsilon": 1.0}), (Breadcrumbs, {"gamma": 1.0}), (Ties, {"gamma": 0.1})],
)
def test_parameters_out_of_range_or_of_another_method_are_refused(
    kind: type[Strategy], parameters: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        kind.Params(**parameters)
