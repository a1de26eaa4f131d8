from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank import merge
from mergekit_lowrank.errors import MergeError, StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, Update, densify
from mergekit_lowrank.spaces import DeltaSpace, FactorSpace, JointParams, JointSpace, ModuleShape, SpaceParams
from mergekit_lowrank.strategies import (
    GramStrategy,
    Karcher,
    MergeContext,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Slerp,
)
from mergekit_lowrank.testing import merge_updates, random_update, random_updates, write_tiny_adapter
from tests.strategies.methods import assert_close

DELTA, FACTORS = DeltaSpace(SpaceParams()), FactorSpace(SpaceParams())
PAIRWISE: tuple[type[GramStrategy], ...] = (Slerp, NuSlerp)
MEANS: tuple[type[GramStrategy], ...] = (MultiSlerp, Karcher, ModelStock)
GRANULARITIES = ("tensor", "row", "column")

each = pytest.mark.parametrize("method", [*PAIRWISE, *MEANS], ids=lambda method: method.name)
each_mean = pytest.mark.parametrize("method", MEANS, ids=lambda method: method.name)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def exact(rows: list[list[float]], scaling: float = 1.0) -> LowRankUpdate:
    """An update with this delta, whatever its scaling."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return LowRankUpdate(matrix / scaling, torch.eye(matrix.shape[1], dtype=torch.float64), scaling)


def merged(
    method: type[GramStrategy],
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    **parameters: object,
) -> Tensor:
    return densify(merge_updates(method(method.Params(**parameters)), DELTA, updates, weights))


# By hand. X and Y are orthogonal, of lengths 1 and 3; Z is at 60° of X and of length 1.
X = exact([[1, 0], [0, 0]], 2.0)
Y = exact([[0, 3], [0, 0]])
Z = exact([[0.5, math.sqrt(0.75)], [0, 0]])


def test_slerp_of_orthogonal_updates_by_hand() -> None:
    assert_close(merged(Slerp, [X, Y], t=1 / 3), exact([[math.sqrt(0.75), 1.5], [0, 0]]).b)


def test_slerp_halfway_between_two_of_one_length_keeps_the_length() -> None:
    assert_close(merged(Slerp, [X, Z]), exact([[math.cos(math.pi / 6), 0.5], [0, 0]]).b)


def test_slerp_between_nearly_parallel_updates_is_linear() -> None:
    near = exact([[1, 0.02], [0, 0]])  # cos 0.9998
    assert_close(merged(Slerp, [X, near], t=0.25), exact([[1, 0.005], [0, 0]]).b)
    arc = merged(Slerp, [X, near], t=0.25, lerp_threshold=0.99999)
    assert float((arc - exact([[1, 0.005], [0, 0]]).b).abs().max()) > 1e-6


def test_slerp_of_opposed_updates_is_linear() -> None:
    assert_close(merged(Slerp, [X, exact([[-3, 0], [0, 0]])], t=0.75), exact([[-2, 0], [0, 0]]).b)


@pytest.mark.parametrize(
    ("weights", "row"),
    [([1, 2], [0.5, 1.5 * math.sqrt(3)]), ([2, -1], [0, -3])],
    ids=["two thirds of the way", "once the way, backwards"],
)
def test_nuslerp_goes_by_the_ratio_of_the_weights(weights: list[float], row: list[float]) -> None:
    assert_close(merged(NuSlerp, [X, Y], weights), exact([row, [0, 0]]).b)


def test_multislerp_has_the_mean_length_and_the_mean_direction() -> None:
    assert_close(merged(MultiSlerp, [X, Y]), exact([[math.sqrt(2), math.sqrt(2)], [0, 0]]).b)
    # Weights 3 and 4: direction (0.6, 0.8), length (3·1 + 4·3)/7.
    assert_close(merged(MultiSlerp, [X, Y], [3, 4]), exact([[15 / 7 * 0.6, 15 / 7 * 0.8], [0, 0]]).b)


def test_multislerp_without_normalisation_has_the_sum_of_the_lengths() -> None:
    assert_close(merged(MultiSlerp, [X, Y], [3, 4], normalize_weights=False), exact([[9, 12], [0, 0]]).b)


def test_the_karcher_mean_of_two_lies_on_their_arc_at_their_share() -> None:
    # A third of 60° from X.
    angle = math.pi / 9
    assert_close(merged(Karcher, [X, Z], [2, 1]), exact([[math.cos(angle), math.sin(angle)], [0, 0]]).b, 1e-5)


def test_the_karcher_mean_differs_from_the_mean_direction() -> None:
    difference = merged(Karcher, [X, Y], [1, 3]) - merged(MultiSlerp, [X, Y], [1, 3])
    assert float(difference.abs().max()) > 0.05


def test_model_stock_of_two_at_sixty_degrees_keeps_two_thirds_of_their_average() -> None:
    assert_close(merged(ModelStock, [X, Z]), exact([[0.5, math.sqrt(0.75) / 3], [0, 0]]).b)


def test_model_stock_with_unequal_weights_counts_fewer_models() -> None:
    # p = 1/4 and 3/4: N = 1 / (10/16) = 1.6, t = 1.6 · 0.5 / (1 + 0.6 · 0.5) = 8/13.
    expected = 8 / 13 * (densify(X) / 4 + densify(Z) * 3 / 4)
    assert_close(merged(ModelStock, [X, Z], [1, 3]), expected)


def test_model_stock_of_orthogonal_updates_is_the_base_model() -> None:
    assert_close(merged(ModelStock, [X, Y]), torch.zeros(2, 2, dtype=torch.float64))


def test_model_stock_turns_round_for_opposed_updates_as_mergekit_does() -> None:
    # cos -0.6: t = -1.2/0.4 = -3 times the average (0.2, 0.4).
    assert_close(merged(ModelStock, [X, exact([[-0.6, 0.8], [0, 0]])]), exact([[-0.6, -1.2], [0, 0]]).b)


# The public formulas on dense vectors.


def dense_slerp(x: Tensor, t: float, threshold: float) -> Tensor:
    a, b = x
    cosine = torch.dot(a / a.norm(), b / b.norm()).clamp(-1, 1)
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def dense_multislerp(x: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
    """With mergekit's step in the tangent space, which this package leaves out."""
    w = weights / weights.sum() if normalize else weights
    lengths = x.norm(dim=1)
    units = x / lengths.unsqueeze(1)
    mean = (w.unsqueeze(1) * units).sum(dim=0)
    mean = mean / mean.norm()
    tangent = (w.unsqueeze(1) * (units - (units @ mean).unsqueeze(1) * mean)).sum(dim=0)
    size = tangent.norm() + 1e-8
    return (mean * size.cos() + tangent * (size.sin() / size)) * (w * lengths).sum()


def dense_karcher(x: Tensor, weights: Tensor) -> Tensor:
    w = weights / weights.sum()
    lengths = x.norm(dim=1)
    units = x / lengths.unsqueeze(1)
    mean = (w.unsqueeze(1) * units).sum(dim=0)
    mean = mean / mean.norm()
    for _ in range(10):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.acos()
        pulls = torch.where(angles < 1e-5, 0, w * angles / angles.sin())
        step = (pulls.unsqueeze(1) * (units - cosines.unsqueeze(1) * mean)).sum(dim=0)
        if step.norm() < 1e-5:
            break
        mean = step.norm().cos() * mean + step.norm().sin() * step / step.norm()
    return mean * (w * lengths).sum()


def dense_model_stock(x: Tensor) -> Tensor:
    n = len(x)
    pairs = [torch.cosine_similarity(x[i], x[j], dim=0) for i in range(n) for j in range(i + 1, n)]
    cosine = torch.stack(pairs).mean()
    return n * cosine / (1 + (n - 1) * cosine) * x.mean(dim=0)


def dense(updates: Sequence[LowRankUpdate], granularity: str, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """The formula applied to whole deltas, to their rows or to their columns."""
    deltas = torch.stack([densify(u) for u in updates])
    if granularity == "tensor":
        return formula(deltas.flatten(1)).view(deltas.shape[1:])
    dim = 1 if granularity == "row" else 2
    return torch.stack([formula(vectors) for vectors in deltas.unbind(dim)], dim=dim - 1)


@st.composite
def modules(draw: st.DrawFn, most: int = 4) -> tuple[list[LowRankUpdate], list[float]]:
    ranks = draw(st.lists(st.integers(1, 9), min_size=2, max_size=most))
    numbers = st.lists(st.floats(0.05, 3), min_size=len(ranks), max_size=len(ranks))
    signs = draw(st.lists(st.sampled_from([1, -1]), min_size=len(ranks), max_size=len(ranks)))
    scalings = [sign * scaling for sign, scaling in zip(signs, draw(numbers), strict=True)]
    updates = random_updates(5, 6, ranks, draw(st.integers(0, 9999)), scalings=scalings, dtype=torch.float64)
    return updates, draw(numbers)


by_examples = settings(deadline=None, max_examples=30)


@each_granularity
@by_examples
@given(module=modules(most=2), t=st.floats(0, 1))
def test_slerp_equals_the_dense_formula(
    granularity: str, module: tuple[list[LowRankUpdate], list[float]], t: float
) -> None:
    updates, _ = module
    expected = dense(updates, granularity, lambda x: dense_slerp(x, t, 0.9995))
    assert_close(merged(Slerp, updates, t=t, granularity=granularity), expected, 1e-8)


@each_granularity
@by_examples
@given(module=modules(most=2))
def test_nuslerp_equals_the_dense_formula(granularity: str, module: tuple[list[LowRankUpdate], list[float]]) -> None:
    updates, weights = module
    expected = dense(updates, granularity, lambda x: dense_slerp(x, weights[1] / sum(weights), 1 - 5e-7))
    assert_close(merged(NuSlerp, updates, weights, granularity=granularity), expected, 1e-8)


@each_granularity
@pytest.mark.parametrize("normalize", [True, False])
@by_examples
@given(module=modules())
def test_multislerp_equals_the_dense_formula_with_its_tangent_step(
    granularity: str, normalize: bool, module: tuple[list[LowRankUpdate], list[float]]
) -> None:
    updates, weights = module
    w = torch.tensor(weights, dtype=torch.float64)
    expected = dense(updates, granularity, lambda x: dense_multislerp(x, w, normalize=normalize))
    found = merged(MultiSlerp, updates, weights, granularity=granularity, normalize_weights=normalize)
    assert_close(found, expected, 1e-8)


@each_granularity
@by_examples
@given(module=modules())
def test_karcher_equals_the_dense_formula(granularity: str, module: tuple[list[LowRankUpdate], list[float]]) -> None:
    updates, weights = module
    w = torch.tensor(weights, dtype=torch.float64)
    expected = dense(updates, granularity, lambda x: dense_karcher(x, w))
    # A step of just about tol is the last of the one and not of the other.
    assert_close(merged(Karcher, updates, weights, granularity=granularity), expected, 3e-5)


@each_granularity
@by_examples
@given(module=modules())
def test_model_stock_equals_the_dense_formula(
    granularity: str, module: tuple[list[LowRankUpdate], list[float]]
) -> None:
    updates, _ = module
    found = merged(ModelStock, updates, granularity=granularity)
    assert_close(found, dense(updates, granularity, dense_model_stock), 1e-6)


# Properties.


@each
@each_granularity
@pytest.mark.parametrize("space", [DELTA, FACTORS], ids=["delta", "factors"])
def test_a_copy_of_the_input_merges_to_the_input(method: type[GramStrategy], granularity: str, space: object) -> None:
    update = random_update(7, 5, 3, scaling=-2.0, dtype=torch.float64)
    found = merge_updates(method(method.Params(granularity=granularity)), space, [update, update])  # type: ignore[arg-type]
    assert_close(densify(found), densify(update))


@each
@each_granularity
def test_the_result_is_low_rank_and_no_delta_is_made(method: type[GramStrategy], granularity: str) -> None:
    updates = random_updates(4096, 4096, [2, 3])
    found = merge_updates(method(method.Params(granularity=granularity)), DELTA, updates)
    assert isinstance(found, LowRankUpdate)
    assert found.rank == 5
    estimate = method(method.Params(granularity=granularity)).working_entries(ModuleShape(4096, 4096, (2, 3)), DELTA)
    assert estimate < 4096 * 4096


@each
@pytest.mark.parametrize("granularity", ["tensor", "column"])  # the rows of joint coordinates are directions
def test_orthonormal_coordinates_would_give_the_same_result(method: type[GramStrategy], granularity: str) -> None:
    updates = random_updates(7, 5, [2, 3], 3, dtype=torch.float64)
    joint = JointSpace(JointParams()).encode(updates, [1.0, 1.0])
    unit = torch.eye(5, dtype=torch.float64)
    coordinates = [LowRankUpdate(block, unit) for block in next(iter(joint.parts[0].blocks()))]
    found = joint.decode([merged(method, coordinates, granularity=granularity)])
    assert_close(densify(found), merged(method, updates, granularity=granularity), 1e-8)


@each
def test_columns_are_the_rows_of_the_transposed_module(method: type[GramStrategy]) -> None:
    updates = random_updates(7, 5, [2, 3], 1, scalings=[0.5, -2.0], dtype=torch.float64)
    turned = merged(method, [u.transposed() for u in updates], granularity="row").T
    assert_close(merged(method, updates, granularity="column"), turned)


@each
@each_granularity
def test_row_blocks_do_not_change_the_result(
    method: type[GramStrategy], granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = random_updates(7, 5, [2, 3], 1)
    whole = merged(method, updates, granularity=granularity)
    monkeypatch.setattr("mergekit_lowrank.strategies.gram.BLOCK_ENTRIES", 40)
    assert_close(merged(method, updates, granularity=granularity), whole, 1e-6)


@by_examples
@given(module=modules(most=2), t=st.floats(0, 1))
def test_slerp_backwards_is_slerp_from_the_other_end(module: tuple[list[LowRankUpdate], list[float]], t: float) -> None:
    updates, _ = module
    assert_close(merged(Slerp, updates[::-1], t=1 - t), merged(Slerp, updates, t=t), 1e-8)


@by_examples
@given(module=modules(most=2), t=st.floats(0, 1))
def test_slerp_between_equal_lengths_keeps_the_length(
    module: tuple[list[LowRankUpdate], list[float]], t: float
) -> None:
    unit = [u.scaled(1 / float(densify(u).norm())) for u in module[0]]
    found = float(merged(Slerp, unit, t=t, lerp_threshold=0.999999).norm())
    assert found == pytest.approx(1, abs=1e-8)


@by_examples
@given(module=modules())
def test_means_of_directions_have_the_mean_length(module: tuple[list[LowRankUpdate], list[float]]) -> None:
    updates, weights = module
    length = sum(w * float(densify(u).norm()) for u, w in zip(updates, weights, strict=True)) / sum(weights)
    for method in (MultiSlerp, Karcher):
        assert float(merged(method, updates, weights).norm()) == pytest.approx(length, rel=1e-8)


@by_examples
@given(module=modules(most=2))
def test_the_karcher_mean_of_two_equal_lengths_is_nuslerp(module: tuple[list[LowRankUpdate], list[float]]) -> None:
    updates, weights = module
    unit = [u.scaled(1 / float(densify(u).norm())) for u in updates]
    assert_close(merged(Karcher, unit, weights, max_iter=100), merged(NuSlerp, unit, weights), 1e-4)


def test_the_karcher_mean_without_steps_is_multislerp() -> None:
    updates = random_updates(7, 5, [2, 3, 1], dtype=torch.float64)
    assert_close(merged(Karcher, updates, [1, 2, 3], max_iter=0), merged(MultiSlerp, updates, [1, 2, 3]))


@each_mean
@each_granularity
def test_an_input_of_weight_zero_changes_nothing(method: type[GramStrategy], granularity: str) -> None:
    updates = random_updates(7, 5, [2, 3, 1], dtype=torch.float64)
    found = merged(method, updates, [1.0, 0.0, 2.5], granularity=granularity)
    assert_close(found, merged(method, updates[::2], [1.0, 2.5], granularity=granularity))


@each_mean
def test_only_the_ratios_of_the_weights_matter(method: type[GramStrategy]) -> None:
    updates = random_updates(7, 5, [2, 3, 1], dtype=torch.float64)
    assert_close(merged(method, updates, [2, 4, 6]), merged(method, updates, [0.5, 1, 1.5]))


# Zeros, copies and opposites.


ZERO = exact([[0, 0], [0, 0]])


@pytest.mark.parametrize("method", PAIRWISE, ids=lambda method: method.name)
def test_interpolation_with_a_zero_update_is_linear(method: type[GramStrategy]) -> None:
    assert_close(merged(method, [Y, ZERO]), 0.5 * densify(Y))


def test_means_count_a_zero_update_in_the_length_and_not_in_the_direction() -> None:
    expected = exact([[4 / 3 / math.sqrt(2)] * 2, [0, 0]]).b
    for method in (MultiSlerp, Karcher):
        assert_close(merged(method, [X, ZERO, Y]), expected)


def test_model_stock_takes_a_zero_update_as_orthogonal() -> None:
    # Two copies and a zero: cos 1/3, t 0.6, the average 2/3 · X.
    assert_close(merged(ModelStock, [X, X, ZERO]), 0.4 * densify(X))


@each_granularity
def test_rows_that_are_zero_in_one_input_are_linear_and_the_others_follow_the_arc(granularity: str) -> None:
    first, second = exact([[1, 0], [1, 0]]), exact([[0, 0], [0, 2]])
    if granularity == "row":
        expected = [[0.5, 0], [math.sqrt(0.5), math.sqrt(2)]]
    else:  # the whole updates are orthogonal; every column is zero in one of them
        share = math.sqrt(0.5) if granularity == "tensor" else 0.5
        expected = [[share, 0], [share, 2 * share]]
    assert_close(merged(Slerp, [first, second], granularity=granularity), exact(expected).b)


@each
def test_opposed_copies_cancel_and_stay_finite(method: type[GramStrategy]) -> None:
    update = random_update(7, 5, 3)
    found = merged(method, [update, update.scaled(-1.0)])
    assert float(found.abs().max()) <= 1e-6 * float(densify(update).abs().max())


@pytest.mark.parametrize("method", [MultiSlerp, Karcher], ids=lambda method: method.name)
def test_opposed_updates_without_a_mean_direction_are_averaged(method: type[GramStrategy]) -> None:
    found = merged(method, [X, X.scaled(-3.0), Y, Y.scaled(-1.0)])
    assert_close(found, -0.5 * densify(X))


@pytest.mark.parametrize("method", [MultiSlerp, Karcher], ids=lambda method: method.name)
def test_a_majority_of_opposed_copies_wins_with_the_mean_length(method: type[GramStrategy]) -> None:
    assert_close(merged(method, [X, X, X.scaled(-4.0)]), 2 * densify(X))


def test_an_update_far_shorter_than_the_others_does_not_turn_the_karcher_mean() -> None:
    assert_close(merged(Karcher, [X, Y.scaled(1e-9)]), 0.5 * densify(X), 1e-8)


@each
def test_tiny_updates_merge_like_large_ones(method: type[GramStrategy]) -> None:
    updates = random_updates(7, 5, [2, 3], 2, dtype=torch.float64)
    tiny = merged(method, [u.scaled(1e-12) for u in updates])
    assert_close(tiny * 1e12, merged(method, updates), 1e-8)


# In factors.


def test_factors_interpolate_a_and_b_apart() -> None:
    # Equal A: B follows the arc between B_1 and B_2, scalings included, and A stays.
    a = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    first = LowRankUpdate(torch.tensor([[1.0], [0.0]], dtype=torch.float64), a, 4.0)
    second = LowRankUpdate(torch.tensor([[0.0], [1.0]], dtype=torch.float64), a, 4.0)
    found = densify(merge_updates(Slerp(Slerp.Params(t=1 / 3)), FACTORS, [first, second]))
    assert_close(found, 4 * torch.tensor([[math.sqrt(0.75)], [0.5]], dtype=torch.float64) @ a)


@each
@each_granularity
def test_factors_of_unequal_ranks_are_padded(method: type[GramStrategy], granularity: str) -> None:
    updates = random_updates(7, 5, [2, 3], 1, scalings=[2.0, 0.5], dtype=torch.float64)
    strategy = method(method.Params(granularity=granularity))
    found: Update = merge_updates(strategy, FACTORS, updates)
    assert isinstance(found, LowRankUpdate)
    assert found.rank == 3
    first = updates[0]
    padded = LowRankUpdate(torch.cat([first.b, first.b.new_zeros(7, 1)], 1), torch.cat([first.a, first.a[:1] * 0]), 2.0)
    assert_close(densify(merge_updates(strategy, FACTORS, [padded, updates[1]])), densify(found))


# Weights and missing modules.


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 2.0], [0.5, 1.5], [1.0, -1.0]])
def test_slerp_refuses_weights(weights: list[float]) -> None:
    message = (
        r"'slerp' takes no weights, and found \[.*\] \(1 each is the default\); set parameters\.t, or use .*nuslerp"
    )
    with pytest.raises(StrategyError, match=message):
        Slerp(Slerp.Params()).check_weights(weights, sum(weights))


def test_nuslerp_refuses_weights_that_sum_to_zero() -> None:
    message = r"the weights \[1\.0, -1\.0\] sum to 0, and 'nuslerp' goes .*; for a difference of updates use task_arith"
    with pytest.raises(StrategyError, match=message):
        NuSlerp(NuSlerp.Params()).check_weights([1.0, -1.0], 0.0)


@each_mean
@pytest.mark.parametrize("weights", [[1.0, -0.5], [0.0, 0.0]])
def test_means_of_directions_refuse_negative_weights_and_none_at_all(
    method: type[GramStrategy], weights: list[float]
) -> None:
    message = rf"'{method.name}' is a mean of directions: its weights must be 0 or more and not all 0, and found \["
    with pytest.raises(StrategyError, match=message):
        method(method.Params()).check_weights(weights, sum(weights))


def alone(method: type[GramStrategy], position: int, weight: float, total: float, **parameters: object) -> Tensor:
    """What is left of X where only the input at ``position`` has the module, as a share of it."""
    strategy = method(method.Params(**parameters))
    strategy.check_weights([weight], total)
    context = MergeContext("m", (position,), (weight,), total)
    return densify(strategy.merge(DELTA.encode([X], [weight]), context))[0, 0]


def test_a_module_that_one_model_lacks_is_interpolated_with_zero() -> None:
    assert alone(Slerp, 0, 1.0, 2.0, t=0.2) == pytest.approx(0.8)
    assert alone(Slerp, 1, 1.0, 2.0, t=0.2) == pytest.approx(0.2)
    assert alone(NuSlerp, 1, 3.0, 4.0) == pytest.approx(0.75)
    for method in MEANS:
        assert alone(method, 1, 3.0, 4.0) == pytest.approx(0.75)


def test_a_module_that_one_model_lacks_comes_back_whole_where_weights_are_renormalised() -> None:
    for method in (*PAIRWISE, *MEANS):
        assert alone(method, 1, 2.0, 2.0) == pytest.approx(1)


def test_the_report_compares_with_the_linear_interpolation_or_average() -> None:
    assert Slerp(Slerp.Params(t=0.25)).target_weights((1.0, 1.0), 2.0) == (0.75, 0.25)
    for method in (NuSlerp, *MEANS):
        assert method(method.Params()).target_weights((1.0, 3.0), 4.0) == (0.25, 0.75)
    plain = MultiSlerp(MultiSlerp.Params(normalize_weights=False))
    assert plain.target_weights((1.0, 3.0), 4.0) == (1.0, 3.0)


# Through the front door.


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, object]:
    first = write_tiny_adapter(tmp_path / "a", {"layers.0.q": (6, 5), "layers.1.q": (6, 5)}, seed=1)
    second = write_tiny_adapter(tmp_path / "b", {"layers.0.q": (6, 5)}, seed=2, rank=3)
    return {"models": [{"model": str(first)}, {"model": str(second)}], "output": {"rank": "sum"}}


@each
@pytest.mark.parametrize("missing", ["zero", "present"])
def test_two_adapters_merge_with_nothing_but_defaults(
    method: type[GramStrategy], missing: str, recipe: dict[str, object]
) -> None:
    report = merge({"merge_method": method.name, "missing": missing, **recipe}).report
    both, lone = report.modules
    assert both["kept_energy"] == pytest.approx(1)
    kept = lone["merged_norm"] / lone["input_norms"][0]
    # Input norms count the weight, which ``present`` has doubled.
    assert kept == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("method", PAIRWISE, ids=lambda method: method.name)
def test_interpolation_of_three_models_is_refused(method: type[GramStrategy], recipe: dict[str, object]) -> None:
    models = recipe["models"]
    assert isinstance(models, list)
    with pytest.raises(MergeError, match=f"'{method.name}' merges exactly 2 models, and the recipe gives 3"):
        merge({"merge_method": method.name, "models": [*models, models[0]]})
