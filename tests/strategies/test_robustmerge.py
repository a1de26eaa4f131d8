from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import FactorSpace, SpaceParams
from mergekit_lowrank.strategies import RobustMerge
from mergekit_lowrank.testing import merge_updates, random_updates

# At density 1/2 the threshold of A is its third smallest magnitude, 1, and that of B its second, 1.
A = torch.tensor([[4.0, 2.0, 1.0], [3.0, -0.5, 0.5]])
B = torch.tensor([[1.0, 2.0], [-3.0, 0.1]])
PRUNED_A = torch.tensor([[4.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
PRUNED_B = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
FIRST = LowRankUpdate(B, A)
SECOND = LowRankUpdate(torch.ones(2, 2), torch.ones(2, 3))


def robustmerge(**parameters: Any) -> RobustMerge:
    return RobustMerge(RobustMerge.Params(**{"density": 0.5, "unlifted": 1.0, **parameters}))


def merged(updates: list[LowRankUpdate], weights: list[float] | None = None, **parameters: Any) -> LowRankUpdate:
    update = merge_updates(robustmerge(**parameters), FactorSpace(SpaceParams()), updates, weights)
    assert isinstance(update, LowRankUpdate)
    return update


def scales(a: Tensor, pruned: Tensor, **parameters: float) -> list[float]:
    whole, left = (factor.abs().sum(dim=1).unsqueeze(0) for factor in (a, pruned))
    return robustmerge(**parameters).component_scales(whole, left, [len(a)])[0].tolist()


def test_the_scale_of_a_row_is_what_pruning_left_of_it() -> None:
    assert scales(A, PRUNED_A) == pytest.approx([1.0, 4 / 3])


def test_smaller_scales_are_lifted_to_the_smallest_that_keeps_its_own() -> None:
    assert scales(A, PRUNED_A, unlifted=0.2) == pytest.approx([4 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("unlifted", "expected"), [(0.0, [4, 4, 4, 4]), (0.25, [4, 4, 4, 4]), (0.5, [3, 3, 3, 4]), (1.0, [2, 1, 3, 4])]
)
def test_the_share_that_keeps_its_scale_is_counted_from_the_largest(unlifted: float, expected: list[float]) -> None:
    a = torch.tensor([[2.0], [1.0], [3.0], [4.0]])
    assert scales(a, torch.ones(4, 1), unlifted=unlifted) == expected


def test_padded_components_have_no_scale_and_lift_nothing() -> None:
    whole, left = torch.tensor([[4.0, 3.0, 0.0], [4.0, 9.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0], [2.0, 3.0, 1.0]])
    found = robustmerge(unlifted=0.5).component_scales(whole, left, [2, 3])
    assert found.tolist() == [[3.0, 3.0, 0.0], [2.0, 3.0, 2.0]]


def test_one_input_by_hand() -> None:
    update = merged([FIRST])
    torch.testing.assert_close(update.a, 2 * PRUNED_A)
    torch.testing.assert_close(update.b, 2 * PRUNED_B)


def test_two_inputs_by_hand() -> None:
    update = merged([FIRST, SECOND])
    torch.testing.assert_close(update.a, torch.tensor([[10.0, 6.0, 4.0], [8.0, 2.0, 2.0]]))
    # Second column: 2·(4/3·[2, 0] + 1·[1, 1]) / (4/3 + 1).
    torch.testing.assert_close(update.b, torch.tensor([[2.0, 22 / 7], [-2.0, 6 / 7]]))


def test_a_weight_multiplies_the_numerator_only() -> None:
    update = merged([FIRST, SECOND], [1.0, -0.5])
    torch.testing.assert_close(update.a, merged([FIRST, SECOND]).a)
    # First column: 2·([1, -3] - [1, 1]/2) / 2; second: 2·(4/3·[2, 0] - [1, 1]/2) / (7/3).
    torch.testing.assert_close(update.b, torch.tensor([[0.5, 13 / 7], [-3.5, -3 / 7]]))


def test_the_scaling_of_an_adapter_is_folded_into_b() -> None:
    update = merged([FIRST.scaled(3.0), SECOND.scaled(3.0)])
    torch.testing.assert_close(update.a, merged([FIRST, SECOND]).a)
    torch.testing.assert_close(update.b, 3 * merged([FIRST, SECOND]).b)


def test_the_factor_enters_on_both_sides() -> None:
    torch.testing.assert_close(densify(merged([FIRST], factor=1.0)), PRUNED_B @ PRUNED_A)
    torch.testing.assert_close(densify(merged([FIRST], factor=3.0)), 9 * PRUNED_B @ PRUNED_A)


def test_components_that_an_input_lacks_stay_out_of_the_denominator() -> None:
    narrow = LowRankUpdate(torch.ones(2, 1), torch.ones(1, 3))
    for updates in ([FIRST, narrow], [narrow, FIRST]):
        update = merged(updates)
        torch.testing.assert_close(update.a, torch.tensor([[10.0, 6.0, 4.0], [6.0, 0.0, 0.0]]))
        torch.testing.assert_close(update.b, torch.tensor([[2.0, 4.0], [-2.0, 0.0]]))


def test_a_wholly_pruned_row_takes_the_largest_finite_scale() -> None:
    a = torch.tensor([[10.0, 4.0, 1.0], [1.0, 1.0, 1.0]])
    pruned = torch.tensor([[10.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert scales(a, pruned) == pytest.approx([15 / 14, 15 / 14])


def test_a_wholly_pruned_row_gives_a_finite_result() -> None:
    a = torch.tensor([[10.0, 4.0, 1.0], [1.0, 1.0, 1.0]])
    update = merged([LowRankUpdate(B, a), SECOND], density=1 / 6)
    assert update.a[1].tolist() == [2.0, 2.0, 2.0]
    assert bool(densify(update).isfinite().all())


def test_an_adapter_whose_a_is_zero_has_scales_of_one() -> None:
    assert scales(torch.zeros(2, 3), torch.zeros(2, 3)) == [1.0, 1.0]


def test_density_one_prunes_nothing() -> None:
    update = merged([FIRST], density=1.0)
    torch.testing.assert_close(densify(update), 4 * B @ A)


def test_density_zero_keeps_the_largest_entry() -> None:
    update = merged([FIRST], density=0.0)
    assert update.a.tolist() == [[8.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_pruning_share_of_less_than_one_entry_still_has_a_threshold() -> None:
    # k would be int(0.9) = 0, which the reference cannot select; the smallest magnitude keeps all.
    tiny = LowRankUpdate(torch.ones(1, 1), torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(merged([tiny], density=0.7).a, torch.tensor([[2.0, 4.0, 6.0]]))


def test_the_result_has_the_largest_input_rank() -> None:
    assert merged(random_updates(6, 5, [1, 4, 2])).rank == 4
