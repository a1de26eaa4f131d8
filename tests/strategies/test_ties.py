from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.lowrank import selection as selection_module
from mergekit_lowrank.spaces import (
    CoreSpace,
    DeltaSpace,
    FactorSpace,
    JointParams,
    JointSpace,
    Part,
    Space,
    SpaceParams,
)
from mergekit_lowrank.spaces import base as base_module
from mergekit_lowrank.strategies import MergeContext, Ties
from mergekit_lowrank.strategies.thresholds import ThresholdSurvey
from mergekit_lowrank.testing import merge_modules, merge_updates, random_updates

DELTA = DeltaSpace(SpaceParams())
FIRST = torch.tensor([[4.0, -1.0, 2.0], [0.5, 3.0, -2.0]])
SECOND = torch.tensor([[1.0, -5.0, -3.0], [2.0, -0.5, 4.0]])


def ties(**parameters: Any) -> Ties:
    return Ties(Ties.Params(**parameters))


def exactly(delta: Tensor) -> LowRankUpdate:
    """An update whose delta is this matrix, bit for bit."""
    return LowRankUpdate(delta, torch.eye(delta.shape[1], dtype=delta.dtype))


def merged(*deltas: Tensor, weights: list[float] | None = None, **parameters: Any) -> Tensor:
    return densify(merge_updates(ties(**parameters), DELTA, [exactly(d) for d in deltas], weights))


# Thresholds 2 and 2: kept are 4, 2, 3, -2 of the first and -5, -3, 2, 4 of the second.


def test_the_mean_of_agreeing_entries_by_hand() -> None:
    assert merged(FIRST, SECOND, density=0.5).tolist() == [[4.0, -5.0, -3.0], [2.0, 3.0, 4.0]]


def test_the_sum_of_agreeing_entries_by_hand() -> None:
    found = merged(FIRST, FIRST, SECOND, density=0.5, disjoint="sum")
    assert found.tolist() == [[8.0, -5.0, 4.0], [2.0, 6.0, 4.0]]


def test_the_largest_of_agreeing_entries_by_hand() -> None:
    found = merged(FIRST, 2 * FIRST, SECOND, density=0.5, disjoint="max")
    assert found.tolist() == [[8.0, -5.0, 4.0], [2.0, 6.0, -4.0]]


def test_weights_take_part_in_the_election_and_in_the_mean() -> None:
    # Votes 8, -5, 4 - 3, 2, 6 and 4 - 4: the last cancel, and the majority is positive.
    found = merged(FIRST, SECOND, weights=[2.0, 1.0], density=0.5)
    assert found.tolist() == [[4.0, -5.0, 2.0], [2.0, 3.0, 4.0]]


def test_an_unweighted_election_ignores_the_weights() -> None:
    found = merged(FIRST, SECOND, weights=[2.0, 1.0], density=0.5, weighted_election=False)
    assert found.tolist() == [[4.0, -5.0, -3.0], [2.0, 3.0, 4.0]]


def test_a_negative_weight_turns_its_input_round() -> None:
    torch.testing.assert_close(merged(FIRST, weights=[-1.0], density=1.0), -FIRST)


def test_dividing_by_signed_weights_flips_a_negative_weight_back() -> None:
    torch.testing.assert_close(merged(FIRST, weights=[-1.0], density=1.0, divisor="weights"), FIRST)


def test_dividing_by_the_count_leaves_the_weight_in() -> None:
    torch.testing.assert_close(merged(FIRST, weights=[3.0], density=1.0, divisor="count"), 3 * FIRST)
    torch.testing.assert_close(merged(FIRST, weights=[3.0], density=1.0), FIRST)


def test_dividing_by_the_inputs_counts_those_that_do_not_agree() -> None:
    found = merged(FIRST, SECOND, density=0.5, divisor="inputs", weights=[1.0, 3.0])
    assert found.tolist() == [[2.0, -7.5, -4.5], [3.0, 1.5, 6.0]]


def test_without_an_election_all_that_is_kept_is_merged() -> None:
    found = merged(FIRST, SECOND, density=0.5, elect="none")
    assert found.tolist() == [[4.0, -5.0, -0.5], [2.0, 3.0, 1.0]]
    found = merged(FIRST, SECOND, density=0.5, elect="none", disjoint="max")
    assert found.tolist() == [[4.0, -5.0, -3.0], [2.0, 3.0, 4.0]]


def test_without_an_election_a_model_wide_trim_does_not_survey_signs() -> None:
    survey = ties(scope="model", elect="none").survey()
    assert isinstance(survey, ThresholdSurvey)
    assert survey.count_signs is None


@pytest.mark.parametrize(("inclusive", "kept"), [(True, 4), (False, 3)])
def test_one_entry_more_is_kept_where_the_threshold_is_inclusive(inclusive: bool, kept: int) -> None:
    assert int(merged(SECOND, density=0.5, inclusive=inclusive).count_nonzero()) == kept


def test_entries_that_tie_with_the_threshold_are_all_kept() -> None:
    # The fourth smallest magnitude of the first is 2, and there are two of them.
    assert int(merged(FIRST, density=0.5, inclusive=False).count_nonzero()) == 4


@pytest.mark.parametrize("inclusive", [True, False])
def test_trim_keeps_at_least_one_entry(inclusive: bool) -> None:
    assert merged(SECOND, density=0.0, inclusive=inclusive).tolist() == [[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]


def test_density_one_keeps_all_but_still_elects() -> None:
    assert merged(FIRST, SECOND, density=1.0).tolist() == [[2.5, -3.0, -3.0], [1.25, 3.0, 4.0]]


def test_an_election_by_frequency_counts_inputs() -> None:
    rows = [torch.tensor([[3.0]]), torch.tensor([[-1.0]]), torch.tensor([[-1.0]])]
    assert merged(*rows, density=1.0).item() == 3.0
    assert merged(*rows, density=1.0, elect="frequency").item() == -1.0


def test_each_input_may_have_a_density_of_its_own() -> None:
    context = MergeContext("m", (0, 1), (1.0, 1.0), 2.0, input_params=({"density": 1.0}, {}))
    coordinates = DELTA.encode([exactly(FIRST), exactly(torch.zeros(2, 3))], [1.0, 1.0])
    found = densify(ties(density=0.0).merge(coordinates, context))
    assert torch.equal(found, FIRST)


CANCELLED = torch.tensor([[3.0], [-1.0], [-1.0]]), torch.tensor([[-3.0], [-1.0], [-1.0]])
BALANCED = torch.tensor([[3.0], [1.0], [-1.0]]), torch.tensor([[-3.0], [1.0], [-1.0]])
POSITIVE = torch.tensor([[3.0], [1.0], [1.0]]), torch.tensor([[-3.0], [1.0], [1.0]])


@pytest.mark.parametrize(
    ("deltas", "rule", "expected"),
    [
        (CANCELLED, "majority", -3.0),
        (BALANCED, "majority", -3.0),
        (POSITIVE, "majority", 3.0),
        (CANCELLED, "positive", 3.0),
    ],
    ids=["negative majority", "no majority", "positive majority", "always positive"],
)
@pytest.mark.parametrize("limit", [1, 2, 4, 10**6])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_votes_that_cancel_take_the_majority_of_the_whole_part_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, deltas: tuple[Tensor, Tensor], rule: str, expected: float, limit: int, scope: str
) -> None:
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", limit)
    found = merged(*deltas, density=1.0, zero_sign=rule, scope=scope)
    assert found[0].item() == expected


def integers(rows: int, columns: int, seed: int) -> Tensor:
    """Small whole numbers: many ties and many votes that cancel, and sums without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, columns), generator=generator).float()


@pytest.mark.parametrize("limit", [1, 10, 33, 100])
@pytest.mark.parametrize("in_memory", [1 << 24, 0], ids=["gathered", "bracket"])
@pytest.mark.parametrize("parameters", [{}, {"zero_sign": "positive"}, {"disjoint": "sum", "inclusive": False}])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_blocks_of_any_size_give_the_bits_of_one_block(
    monkeypatch: pytest.MonkeyPatch, limit: int, in_memory: int, parameters: Mapping[str, Any], scope: str
) -> None:
    deltas = [integers(11, 7, seed) for seed in range(3)]
    whole = merged(*deltas, density=0.4, scope=scope, **parameters)
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", limit)
    monkeypatch.setattr(selection_module, "IN_MEMORY_ENTRIES", in_memory)
    assert torch.equal(merged(*deltas, density=0.4, scope=scope, **parameters), whole)


SPACES: dict[str, Space] = {
    "delta": DELTA,
    "joint": JointSpace(JointParams()),
    "core": CoreSpace(SpaceParams()),
    "factors": FactorSpace(SpaceParams()),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_blocks_of_any_size_give_equal_values_in_every_space(
    monkeypatch: pytest.MonkeyPatch, space: Space, scope: str
) -> None:
    updates = random_updates(11, 7, [2, 3, 1], 3, dtype=torch.float64)
    whole = densify(merge_updates(ties(density=0.4, scope=scope), space, updates))
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", 12)
    found = densify(merge_updates(ties(density=0.4, scope=scope), space, updates))
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)


MODULES = {"b": (5, 4), "a": (3, 7), "c": (1, 2), "d": (6, 6)}


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("zero_sign", ["majority", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_scope_equals_flattening_all_modules_in_any_order(
    order: str, density: float, zero_sign: str, dtype: torch.dtype
) -> None:
    deltas = {
        name: [integers(*MODULES[name], 10 * t + index).to(dtype) for t in range(3)]
        for index, name in enumerate(sorted(MODULES))
    }
    modules = {name: [exactly(d) for d in deltas[name]] for name in order}
    found = merge_modules(ties(density=density, scope="model", zero_sign=zero_sign), DELTA, modules, [1.0, 0.5, -2.0])
    flat = [torch.cat([deltas[name][t].reshape(-1, 1) for name in order]) for t in range(3)]
    expected = merged(*flat, weights=[1.0, 0.5, -2.0], density=density, zero_sign=zero_sign)
    together = torch.cat([densify(found[name]).reshape(-1, 1) for name in order])
    assert torch.equal(together, expected)


def test_model_scope_in_factors_has_one_threshold_for_a_and_one_for_b_and_one_majority() -> None:
    first, second = (torch.tensor([[3.0, 1.0, 1.0, 1.0]]), torch.tensor([[-3.0, 1.0, 1.0, 1.0]]))
    b = torch.tensor([[-1.0], [1.0], [-1.0]])
    updates = [LowRankUpdate(b, first), LowRankUpdate(b, second)]
    found = merge_updates(ties(density=1.0, scope="model"), FactorSpace(SpaceParams()), updates)
    assert isinstance(found, LowRankUpdate)
    # The signs of A sum to 3 and those of B to -1: positive over both.
    assert found.a[0, 0].item() == 3.0


@pytest.mark.parametrize("divisor", ["absolute_weights", "weights", "count"])
def test_in_factors_no_divisor_cancels_the_scaling_of_an_adapter(divisor: str) -> None:
    (update,) = random_updates(6, 5, [2], scalings=[3.0], dtype=torch.float64)
    found = merge_updates(ties(density=1.0, divisor=divisor), FactorSpace(SpaceParams()), [update])
    torch.testing.assert_close(densify(found), densify(update))


def test_padding_of_unequal_ranks_does_not_count_as_entries() -> None:
    narrow = LowRankUpdate(torch.ones(2, 1), torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    wide = LowRankUpdate(torch.ones(2, 3), torch.zeros(3, 4))
    for scope in ("tensor", "model"):
        found = merge_updates(ties(density=0.5, scope=scope), FactorSpace(SpaceParams()), [narrow, wide])
        assert isinstance(found, LowRankUpdate)
        assert found.a.tolist() == [[4.0, 3.0, 2.0, 0.0], [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("size", [1, 2, 7, 100, 4096])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.29, 0.5, 0.999999])
@pytest.mark.parametrize("inclusive", [True, False])
def test_the_threshold_is_always_an_entry_and_keeps_the_stated_number(
    size: int, density: float, inclusive: bool
) -> None:
    (rank,) = ties(density=density, inclusive=inclusive).sparsify.ranks(size, density)
    assert 1 <= rank <= size
    assert size - rank + 1 == max(1, int(size * density) + inclusive)


def test_only_model_scope_needs_a_survey() -> None:
    assert ties().survey() is None
    assert ties(scope="model").survey() is not None


def test_identity_is_promised_at_density_one_only() -> None:
    assert ties(density=1.0).returns_single_input()
    assert not ties(density=0.99).returns_single_input()


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_outside_zero_and_one_is_refused(density: float) -> None:
    with pytest.raises(ValidationError):
        ties(density=density)


def test_a_part_that_no_input_fills_merges_to_nothing() -> None:
    part = Part.stacked("core", torch.zeros(2, 0, 3), [1.0, 1.0])
    context = MergeContext("m", (0, 1), (1.0, 1.0), 2.0)
    assert ties(density=0.5).merge_part(part, context).shape == (0, 3)
