from __future__ import annotations

import math
import operator

import numpy as np
import pytest
import torch

from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation import Outcome
from mergekit_lowrank.evaluation.bootstrap import Sample, combined, divided, mean_of, samples_of
from mergekit_lowrank.evaluation.comparing import mean_row, row_of
from mergekit_lowrank.evaluation.outcomes import as_outcome

RESAMPLES = 4000


def outcome(right, of):
    return as_outcome([1] * right + [0] * (of - right))


def drawn(outcomes, *, task="arc", seed=0):
    return samples_of(task, outcomes, resamples=RESAMPLES, seed=seed)


def half_width(estimate):
    return (estimate.high - estimate.low) / 2


@pytest.mark.parametrize(
    "known",
    [
        outcome(200, 400),
        Outcome(score=0.5, count=400),
        Outcome(score=0.5, stderr=0.025),
    ],
    ids=["examples", "count", "stderr"],
)
def test_the_interval_of_a_share_is_that_of_the_normal_approximation(known):
    estimate = drawn({"merged": known})["merged"].estimate()
    assert estimate.value == 0.5
    assert half_width(estimate) == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.06)


def test_a_score_by_itself_has_no_interval():
    estimate = drawn({"merged": Outcome(score=31.4)})["merged"].estimate()
    assert (estimate.value, estimate.low, estimate.high) == (31.4, None, None)
    assert not estimate.is_beyond_noise


def test_differences_are_paired_by_example():
    same = drawn({"merged": outcome(200, 400), "base": outcome(200, 400)})
    estimate = combined(operator.sub, same["merged"], same["base"]).estimate()
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    other = drawn({"merged": outcome(201, 400), "base": outcome(200, 400)})
    assert half_width(combined(operator.sub, other["merged"], other["base"]).estimate()) < 0.006


def test_unpaired_differences_add_their_variances():
    known = drawn({"merged": Outcome(score=0.5, count=400), "base": Outcome(score=0.5, count=400)})
    difference = combined(operator.sub, known["merged"], known["base"]).estimate()
    assert half_width(difference) == pytest.approx(1.96 * math.sqrt(0.5 / 400), rel=0.06)


def test_the_draws_of_a_task_depend_on_its_name_and_the_seed_only():
    first = drawn({"merged": outcome(5, 9)})["merged"].replicates
    assert np.array_equal(first, drawn({"merged": outcome(5, 9), "base": outcome(2, 9)})["merged"].replicates)
    assert not np.array_equal(first, drawn({"merged": outcome(5, 9)}, task="gsm8k")["merged"].replicates)
    assert not np.array_equal(first, drawn({"merged": outcome(5, 9)}, seed=1)["merged"].replicates)


def test_many_examples_are_drawn_in_blocks(monkeypatch):
    whole = drawn({"merged": outcome(5, 9)})["merged"].replicates
    monkeypatch.setattr("mergekit_lowrank.evaluation.bootstrap.DRAWN_AT_ONCE", 90)
    blocks = drawn({"merged": outcome(5, 9)})["merged"].replicates
    assert np.array_equal(whole, blocks)


@pytest.mark.parametrize("known", [outcome(3, 3), Outcome(score=1, count=3)], ids=["examples", "count"])
def test_all_right_is_as_unsure_as_its_examples_are_few(known):
    estimate = drawn({"merged": known})["merged"].estimate()
    assert estimate.low == pytest.approx(0.025 ** (1 / 3), abs=0.03)  # Clopper & Pearson
    assert estimate.high == 1


@pytest.mark.parametrize(("count", "is_beyond_noise"), [(1, False), (3, False), (6, True)])
def test_all_right_is_better_than_all_wrong_where_fishers_exact_test_says_so(count, is_beyond_noise):
    known = drawn({"merged": outcome(count, count), "base": outcome(0, count)})
    difference = combined(operator.sub, known["merged"], known["base"]).estimate()
    assert difference.value == 1
    assert difference.is_beyond_noise is is_beyond_noise


@pytest.mark.parametrize("known", [as_outcome([0.7, 0.7]), Outcome(score=0.7, stderr=0)], ids=["examples", "stderr"])
def test_what_does_not_vary_has_no_interval(known):
    assert drawn({"merged": known})["merged"].estimate().low is None


def test_the_same_gain_on_every_example_is_no_certainty():
    known = drawn({"merged": as_outcome([0.3, 0.5, 0.8]), "base": as_outcome([0.2, 0.4, 0.7])})
    difference = combined(operator.sub, known["merged"], known["base"]).estimate()
    assert difference.low is None
    assert not difference.is_beyond_noise


def test_many_examples_give_the_intervals_that_drawing_them_one_by_one_does(monkeypatch):
    known = {"merged": outcome(1500, 2000), "base": as_outcome([0, 1] * 1000)}

    def difference():
        samples = drawn(known)
        return combined(operator.sub, samples["merged"], samples["base"]).estimate()

    counted = difference()
    monkeypatch.setattr("mergekit_lowrank.evaluation.bootstrap.COUNTED_FROM", 1 << 30)
    one_by_one = difference()
    assert counted != one_by_one
    assert counted.value == one_by_one.value
    assert (counted.low, counted.high) == pytest.approx((one_by_one.low, one_by_one.high), abs=0.004)


def test_models_judged_on_other_examples_cannot_be_compared():
    with pytest.raises(EvaluationError, match="'arc': outcomes of 9 of 'merged', 8 of 'base'; expected the same exam"):
        drawn({"merged": outcome(5, 9), "base": outcome(5, 8)})


def test_the_interval_of_a_mean_over_tasks_shrinks_with_their_number():
    tasks = [drawn({"m": outcome(200, 400)}, task=str(k))["m"] for k in range(4)]
    assert half_width(mean_of(tasks).estimate()) == pytest.approx(half_width(tasks[0].estimate()) / 2, rel=0.1)


def test_a_ratio_to_what_may_be_zero_has_no_interval():
    ratio = combined(divided, Sample(1.0, np.array([1.0, 1.0])), Sample(0.5, np.array([0.5, 0.0])))
    assert ratio.value == 2
    assert ratio.estimate().low is None


def rows(**scores):
    return {role: outcome(right, 100) for role, right in scores.items()}


def test_a_task_is_normalised_by_its_own_expert():
    found = row_of("arc", "math", rows(base=40, own=80, merged=60), resamples=RESAMPLES, seed=0).comparison()
    assert found.normalised is not None
    assert found.normalised.value == pytest.approx(0.75)
    assert found.gain is not None
    assert found.gain.value == pytest.approx(0.2)
    assert found.gain.is_beyond_noise
    assert (found.examples, found.basis, found.lead) == (100, "examples", None)


def test_an_expert_at_zero_gives_no_share_and_no_mean_of_shares():
    failed = row_of("arc", "math", rows(own=0, merged=60), resamples=RESAMPLES, seed=0)
    fine = row_of("gsm8k", "math", rows(own=50, merged=25), resamples=RESAMPLES, seed=0)
    assert failed.comparison().normalised is None
    mean = mean_row("mean", [failed, fine]).comparison()
    assert mean.normalised is None
    assert mean.merged.value == pytest.approx(0.425)


def test_a_mean_is_normalised_by_the_mean_of_the_shares():
    low = row_of("arc", "math", rows(own=20, merged=20), resamples=RESAMPLES, seed=0)
    high = row_of("gsm8k", "code", rows(own=80, merged=40), resamples=RESAMPLES, seed=0)
    mean = mean_row("mean", [low, high]).comparison()
    assert mean.normalised is not None
    assert mean.normalised.value == pytest.approx(0.75)
    assert mean.tasks == 2


def test_a_mean_over_tasks_is_as_sure_as_its_weakest():
    known = row_of("arc", None, {"merged": outcome(5, 9)}, resamples=10, seed=0)
    bare = row_of("gsm8k", None, {"merged": Outcome(score=0.5)}, resamples=10, seed=0)
    mean = mean_row("mean", [known, bare]).comparison()
    assert mean.basis == "none"
    assert mean.merged.low is None


@pytest.mark.parametrize("found", [[1, 0, True], (1.0, 0.0, 1.0), np.array([1, 0, 1])], ids=["list", "tuple", "array"])
def test_outcomes_of_examples_come_in_any_sequence(found):
    assert as_outcome(found) == Outcome(score=2 / 3, examples=(1, 0, 1))


@pytest.mark.parametrize(
    "found", [[np.float32(1), np.bool_(False), np.int64(1)], [torch.tensor(1), torch.tensor(0.0), torch.tensor(True)]]
)
def test_scalars_of_numpy_and_torch_are_numbers(found):
    assert as_outcome(found) == Outcome(score=2 / 3, examples=(1, 0, 1))


@pytest.mark.parametrize(
    "found",
    ["0.5", None, [], [0.5, "x"], math.nan, {"acc": 1}, 10**400, 10**5000, [1, -(10**400)], [torch.tensor([1, 0])]],
    ids=lambda found: f"{type(found).__name__}",
)
def test_what_is_no_score_is_refused(found):
    with pytest.raises((TypeError, ValueError)):
        as_outcome(found)


def test_a_score_that_is_not_the_mean_of_its_examples_is_refused():
    with pytest.raises(ValueError, match=r"the score is 66\.6, and the mean of its examples 0\.66"):
        Outcome(score=66.6, examples=(1, 0, 1))


def test_a_count_belongs_to_a_share():
    with pytest.raises(ValueError, match=r"the score is 66\.6; with a count it is a share of right answers"):
        Outcome(score=66.6, count=100)
