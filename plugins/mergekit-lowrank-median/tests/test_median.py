"""The contract that every merge method keeps, and examples by hand."""

from __future__ import annotations

import mergekit_lowrank_median
import pytest
import torch
from mergekit_lowrank_median import Median

from mergekit_lowrank import LowRankUpdate, Params, StrategyError
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.testing import StrategyContract, merge_updates


class TestMedian(StrategyContract):
    plugin = mergekit_lowrank_median
    method = "median"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, -5.0], [2.0, 4.0], [900.0, 3.0]], [2.0, 3.0]),
        ([[1.0, -5.0], [2.0, 4.0], [4.0, 3.0], [900.0, 0.0]], [3.0, 1.5]),
    ],
    ids=["the middle one", "the mean of the middle two"],
)
def test_the_median_of_each_entry(rows: list[list[float]], expected: list[float]) -> None:
    updates = [LowRankUpdate(torch.ones(1, 1), torch.tensor([row])) for row in rows]
    merged = merge_updates(Median(Params()), DeltaSpace(SpaceParams()), updates)
    assert densify(merged).tolist() == [expected]


def test_unequal_weights_are_refused() -> None:
    with pytest.raises(StrategyError, match=r"the weights are \[1\.0, 0\.5\]; give all of them the same weight"):
        Median(Params()).check_weights([1.0, 0.5], 1.5)
