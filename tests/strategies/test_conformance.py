"""Every built-in method keeps the contract, in every space that it supports; and what built-ins promise beyond it."""

from __future__ import annotations

import pytest
import torch

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.testing import StrategyContract, random_update, random_updates
from tests.strategies.methods import Subject, assert_close, each

TOLERANCES: dict[str, float] = {}
"""Of methods that stop an iteration before rounding does."""

SATURATING = frozenset({"pcb"})
"""Methods that see the size of their inputs."""


class BuiltInContract(StrategyContract):
    """Of the methods of this package, whatever else is installed."""

    @classmethod
    def registry(cls) -> Registry:
        return Registry()

    def test_the_method_says_where_it_comes_from(self) -> None:
        assert self.preset().paper.strip()


def contract(method: str) -> type[BuiltInContract]:
    attributes = {"method": method, "tolerance": TOLERANCES.get(method, StrategyContract.tolerance)}
    return type(f"Test_{method}", (BuiltInContract,), {**attributes, "__module__": __name__})


globals().update({f"Test_{method}": contract(method) for method in Registry().methods})


@each(lambda subject: subject.preset.name not in SATURATING)
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scaling_every_input_scales_the_result(subject: Subject, factor: float) -> None:
    updates = random_updates(7, 9, subject.counted((2, 3, 1)), 1, dtype=torch.float64)
    tolerance = TOLERANCES.get(subject.preset.name, 1e-9)
    assert_close(subject.merged([u.scaled(factor) for u in updates]), factor * subject.merged(updates), tolerance)


@each(lambda subject: subject.preset.strategy.name == "linear" and subject.space_kind.name not in ("factors", "tucker"))
def test_linear_returns_the_factors_of_one_input_bit_for_bit(subject: Subject) -> None:
    update = random_update(7, 9, 2, scaling=2.0)
    merged = subject.update([update])
    assert isinstance(merged, LowRankUpdate)
    assert merged.a is update.a
    assert merged.b is update.b
    assert merged.scaling == update.scaling


@each(lambda subject: subject.preset.name in ("linear", "task_arithmetic", "ties", "knots", "core_ties"))
def test_linear_and_ties_at_density_one_promise_that_one_input_comes_back(subject: Subject) -> None:
    assert subject.strategy(density=1.0).returns_single_input()


@each(lambda subject: subject.preset.name in ("linear", "ties", "knots") and subject.space_kind.name != "factors")
@pytest.mark.parametrize("copies", [2, 3, 8])
def test_copies_with_weight_one_over_n_merge_to_themselves(subject: Subject, copies: int) -> None:
    # A mean over n copies divides by Σ|w| = 1, a sum adds n·(1/n).
    update = random_update(7, 9, 2, scaling=2.0, dtype=torch.float64)
    assert_close(subject.merged([update] * copies, [1 / copies] * copies, density=1.0), densify(update), 1e-8)


@each(lambda subject: subject.preset.name == "linear")
def test_an_average_refuses_weights_that_sum_to_zero(subject: Subject) -> None:
    message = (
        r"the weights \[1\.0, -1\.0\] sum to 0, which cannot normalise an average; "
        r"set parameters\.normalize: false for the plain sum"
    )
    with pytest.raises(StrategyError, match=message):
        subject.strategy().check_weights([1.0, -1.0], 0.0)


@each(lambda subject: subject.preset.name in ("task_arithmetic", "ties", "robustmerge", "drm"))
def test_a_sum_takes_weights_that_sum_to_zero(subject: Subject) -> None:
    subject.strategy().check_weights([1.0, -1.0], 0.0)


@each(lambda subject: subject.preset.name in ("linear", "task_arithmetic", "ties", "drm"))
def test_the_report_compares_with_the_sum_that_the_method_aims_at(subject: Subject) -> None:
    averaged = subject.preset.name == "linear"
    assert subject.strategy().target_weights([1.0, 3.0], 4.0) == ((0.25, 0.75) if averaged else (1.0, 3.0))
