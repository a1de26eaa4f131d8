from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import DenseUpdate, InputUpdate, LowRankUpdate, StreamedUpdate, densify
from mergekit_lowrank.spaces import (
    Coordinates,
    CoreSpace,
    DeltaSpace,
    FactorSpace,
    JointCoordinates,
    JointParams,
    JointSpace,
    ModuleShape,
    Space,
    SpaceParams,
    TuckerParams,
    TuckerSpace,
)
from mergekit_lowrank.testing import random_update, random_updates

LINEAR: dict[str, Space] = {
    "delta": DeltaSpace(SpaceParams()),
    "core": CoreSpace(SpaceParams()),
    "joint": JointSpace(JointParams(rank_tolerance=1e-12)),
    "joint vertical": JointSpace(JointParams(direction="vertical", rank_tolerance=1e-12)),
}
ALL: dict[str, Space] = {**LINEAR, "factors": FactorSpace(SpaceParams())}
CASES = {
    "wide": (5, 11, [2, 2]),
    "tall": (11, 5, [2, 2]),
    "odd sizes and mixed ranks": (9, 7, [1, 4, 2]),
    "joint rank above a side": (4, 11, [3, 3]),
    "joint rank above both sides": (4, 5, [4, 4, 4]),
    "one input": (6, 5, [2]),
    "rank one": (6, 5, [1, 1]),
}

in_linear = pytest.mark.parametrize("space", LINEAR.values(), ids=LINEAR)
in_all = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


def weighted_sum(coordinates: Coordinates, coefficients: list[float]) -> torch.Tensor:
    """What comes back when the parts are merged with these coefficients."""
    column = torch.tensor(coefficients, dtype=torch.float64).view(-1, 1, 1)
    return densify(coordinates.decode([p.merged(lambda block: (block * column).sum(dim=0)) for p in coordinates.parts]))


def dense_sum(updates: list[LowRankUpdate], coefficients: list[float]) -> torch.Tensor:
    return torch.stack([c * densify(u) for c, u in zip(coefficients, updates, strict=True)]).sum(dim=0)


@in_linear
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merging_coordinates_with_weights_gives_the_weighted_sum_of_the_deltas(
    space: Space, case: tuple[int, int, list[int]]
) -> None:
    d_out, d_in, ranks = case
    scalings = [0.5 + t for t in range(len(ranks))]
    updates = random_updates(d_out, d_in, ranks, scalings=scalings, dtype=torch.float64)
    coefficients = [1.5, -0.5, 2.0][: len(ranks)]
    found = weighted_sum(space.encode(updates, coefficients), coefficients)
    torch.testing.assert_close(found, dense_sum(updates, coefficients), rtol=1e-10, atol=1e-10)


@in_linear
@settings(deadline=None, max_examples=25)
@given(
    d_out=st.integers(1, 8),
    d_in=st.integers(1, 8),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_each_input_comes_back_from_its_coordinates(
    space: Space, d_out: int, d_in: int, ranks: list[int], seed: int
) -> None:
    updates = random_updates(d_out, d_in, ranks, seed, dtype=torch.float64)
    coordinates = space.encode(updates, [1.0] * len(ranks))
    for t, update in enumerate(updates):
        alone = [float(i == t) for i in range(len(updates))]
        torch.testing.assert_close(weighted_sum(coordinates, alone), densify(update), rtol=1e-8, atol=1e-8)


@in_linear
def test_duplicated_adapters_have_equal_coordinates_and_come_back(space: Space) -> None:
    update = random_update(9, 7, 3, dtype=torch.float64)
    coordinates = space.encode([update, update], [0.5, 0.5])
    (block,) = coordinates.parts[0].blocks()
    torch.testing.assert_close(block[0], block[1])
    torch.testing.assert_close(weighted_sum(coordinates, [0.5, 0.5]), densify(update))


@in_linear
@pytest.mark.parametrize("zero", ["a", "b"])
def test_zero_updates_decode_to_zero(space: Space, zero: str) -> None:
    b = torch.zeros(4, 2).double() if zero == "b" else torch.ones(4, 2).double()
    a = torch.zeros(2, 5).double() if zero == "a" else torch.ones(2, 5).double()
    coordinates = space.encode([LowRankUpdate(b, a)] * 2, [1.0, 1.0])
    assert torch.equal(weighted_sum(coordinates, [1.0, 1.0]), torch.zeros(4, 5).double())


@in_all
def test_whether_a_space_is_linear_is_declared_truly(space: Space) -> None:
    updates = random_updates(6, 5, [2, 2], dtype=torch.float64)
    coordinates = space.encode(updates, [1.0, 1.0])
    close = torch.allclose(weighted_sum(coordinates, [1.0, 1.0]), dense_sum(updates, [1.0, 1.0]))
    assert close == coordinates.is_linear


@in_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_and_results_keep_the_type_of_the_factors(space: Space, dtype: torch.dtype) -> None:
    coordinates = space.encode(random_updates(6, 5, [2, 3], dtype=dtype), [1.0, 1.0])
    assert {block.dtype for part in coordinates.parts for block in part.blocks()} == {dtype}
    assert {part.dtype for part in coordinates.parts} == {dtype}
    assert densify(coordinates.decode([p.merged(lambda block: block[0]) for p in coordinates.parts])).dtype == dtype


@in_all
def test_encoding_and_merging_do_not_modify_the_updates(space: Space) -> None:
    updates = random_updates(6, 5, [2, 3], dtype=torch.float64)
    before = [(u.a.clone(), u.b.clone()) for u in updates]
    weighted_sum(space.encode(updates, [1.0, 2.0]), [1.0, 2.0])
    for update, (a, b) in zip(updates, before, strict=True):
        assert torch.equal(update.a, a)
        assert torch.equal(update.b, b)


@in_all
def test_coordinates_keep_the_updates_and_the_weights_they_were_given(space: Space) -> None:
    updates = random_updates(6, 5, [2, 3])
    coordinates = space.encode(updates, [0.5, -2.0])
    assert coordinates.updates == tuple(updates)
    assert coordinates.weights == (0.5, -2.0)


@in_all
def test_views_that_are_not_contiguous_give_the_same_coordinates(space: Space) -> None:
    updates = random_updates(6, 5, [2, 3], dtype=torch.float64)
    views = [LowRankUpdate(u.b.T.contiguous().T, u.a.T.contiguous().T, u.scaling) for u in updates]
    assert not views[1].a.is_contiguous()
    found = weighted_sum(space.encode(views, [1.0, 1.0]), [1.0, 2.0])
    torch.testing.assert_close(found, weighted_sum(space.encode(updates, [1.0, 1.0]), [1.0, 2.0]))


@pytest.mark.parametrize("space", [DeltaSpace(SpaceParams()), FactorSpace(SpaceParams())], ids=["delta", "factors"])
def test_only_delta_space_gives_a_dense_update(space: Space) -> None:
    coordinates = space.encode(random_updates(6, 5, [2, 2]), [1.0, 1.0])
    merged = coordinates.decode([part.merged(lambda block: block[0]) for part in coordinates.parts])
    assert isinstance(merged, DenseUpdate) == isinstance(space, DeltaSpace)


def test_delta_coordinates_are_the_entries_of_the_deltas() -> None:
    update = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, -1.0]]), 3.0)
    (block,) = DeltaSpace(SpaceParams()).encode([update], [1.0]).parts[0].blocks()
    assert torch.equal(block, torch.tensor([[[3.0, 0.0, -3.0], [6.0, 0.0, -6.0]]]))


def test_joint_coordinates_are_singular_values_times_right_blocks() -> None:
    updates = [
        LowRankUpdate(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]])),
        LowRankUpdate(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0, 0.0, 0.0]])),
    ]
    (block,) = JointSpace(JointParams()).encode(updates, [1.0, 1.0]).parts[0].blocks()
    expected = torch.tensor([[[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
    torch.testing.assert_close(block, expected)


def test_vertical_joint_coordinates_are_those_of_the_transposed_updates() -> None:
    updates = random_updates(6, 5, [2, 2], dtype=torch.float64)
    vertical = JointSpace(JointParams(direction="vertical")).encode(updates, [1.0, 1.0])
    transposed = JointSpace(JointParams()).encode([u.transposed() for u in updates], [1.0, 1.0])
    torch.testing.assert_close(next(vertical.parts[0].blocks()), next(transposed.parts[0].blocks()))


def test_core_coordinates_do_not_depend_on_a_common_rotation_of_the_factors() -> None:
    updates = random_updates(8, 7, [2, 3], dtype=torch.float64)
    turned = []
    for t, update in enumerate(updates):
        q, _ = torch.linalg.qr(random_update(update.rank, update.rank, update.rank, 9 + t, dtype=torch.float64).b)
        turned.append(LowRankUpdate(update.b @ q, q.T @ update.a))
    space = CoreSpace(SpaceParams())
    first, second = (next(space.encode(u, [1.0, 1.0]).parts[0].blocks()) for u in (updates, turned))
    torch.testing.assert_close(first, second)


def test_core_coordinates_are_at_most_joint_rank_wide() -> None:
    part = CoreSpace(SpaceParams()).encode(random_updates(8, 4, [2, 3]), [1.0, 1.0]).parts[0]
    assert part.shape == (5, 4)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_joint_results_are_low_rank_adapters(direction: str) -> None:
    space = JointSpace(JointParams(direction=direction))
    coordinates = space.encode(random_updates(8, 7, [2, 1]), [1.0, 1.0])
    merged = coordinates.decode([coordinates.parts[0].merged(lambda block: block.sum(dim=0))])
    assert isinstance(merged, LowRankUpdate)
    assert (merged.rank, merged.shape) == (3, (8, 7))


def test_factors_take_the_root_of_weight_times_scaling_and_the_sign_on_a() -> None:
    updates = random_updates(6, 5, [2, 2], scalings=[2.0, 8.0], dtype=torch.float64)
    a, b = FactorSpace(SpaceParams()).encode(updates, [0.5, -0.5]).parts
    assert a.weights == pytest.approx((1.0, -2.0))
    assert b.weights == pytest.approx((1.0, 2.0))


def test_in_factors_a_mean_divides_by_roots_of_the_weights_without_the_scalings() -> None:
    updates = random_updates(6, 5, [2, 2], scalings=[2.0, 8.0], dtype=torch.float64)
    a, b = FactorSpace(SpaceParams()).encode(updates, [0.25, -4.0]).parts
    assert a.shares == pytest.approx((0.5, -2.0))
    assert b.shares == pytest.approx((0.5, 2.0))


def test_one_input_in_factors_comes_back_at_its_weight_and_scaling() -> None:
    (update,) = random_updates(6, 5, [2], scalings=[3.0], dtype=torch.float64)
    coordinates = FactorSpace(SpaceParams()).encode([update], [-0.7])
    merged = coordinates.decode([next(part.blocks())[0] * part.weights[0] for part in coordinates.parts])
    torch.testing.assert_close(densify(merged), -0.7 * densify(update))


def test_factors_follow_the_formula_of_peft_for_two_inputs() -> None:
    first, second = random_updates(6, 5, [2, 2], scalings=[2.0, 1.0], dtype=torch.float64)
    coordinates = FactorSpace(SpaceParams()).encode([first, second], [0.7, -0.3])
    parts = [sum(w * x for w, x in zip(p.weights, next(p.blocks()), strict=True)) for p in coordinates.parts]
    expected_a = math.sqrt(1.4) * first.a - math.sqrt(0.3) * second.a
    expected_b = math.sqrt(1.4) * first.b + math.sqrt(0.3) * second.b
    torch.testing.assert_close(densify(coordinates.decode(parts)), expected_b @ expected_a)


def test_factors_of_unequal_rank_are_padded_with_zeros_that_are_not_the_inputs_own() -> None:
    updates = random_updates(6, 5, [1, 3])
    a, b = FactorSpace(SpaceParams()).encode(updates, [1.0, 1.0]).parts
    assert (a.shape, b.shape) == ((3, 5), (6, 3))
    assert (a.sizes, b.sizes) == ((5, 15), (6, 18))
    block = next(a.blocks())
    assert torch.equal(block[0, :1], updates[0].a)
    assert torch.equal(block[0, 1:], torch.zeros(2, 5))


SHAPE = ModuleShape(64, 48, (4, 8))
LARGER = {
    "a longer output": ModuleShape(128, 48, (4, 8)),
    "a longer input": ModuleShape(64, 96, (4, 8)),
    "a larger rank": ModuleShape(64, 48, (4, 16)),
    "one input more": ModuleShape(64, 48, (4, 8, 8)),
}


def test_a_module_shape_adds_up_its_ranks_and_factors() -> None:
    assert (SHAPE.inputs, SHAPE.joint_rank, SHAPE.factor_entries) == (2, 12, 12 * 112)


@in_all
@pytest.mark.parametrize("larger", LARGER.values(), ids=LARGER)
def test_memory_estimates_are_positive_and_grow_with_every_size(space: Space, larger: ModuleShape) -> None:
    assert 0 < space.working_entries(SHAPE) <= space.working_entries(larger)


@in_linear
def test_memory_estimates_of_large_modules_never_hold_all_dense_deltas(space: Space) -> None:
    shape = ModuleShape(4096, 11008, (16,) * 8)
    assert space.working_entries(shape) < 3 * shape.d_out * shape.d_in


@in_all
@settings(deadline=None, max_examples=25)
@given(d_out=st.integers(1, 8), d_in=st.integers(1, 8), ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_rank_of_a_merged_update_never_exceeds_its_stated_bound(
    space: Space, d_out: int, d_in: int, ranks: list[int]
) -> None:
    coordinates = space.encode(random_updates(d_out, d_in, ranks, dtype=torch.float64), [1.0] * len(ranks))
    merged = coordinates.decode([part.merged(lambda block: block.sum(dim=0)) for part in coordinates.parts])
    assert int(torch.linalg.matrix_rank(densify(merged))) <= space.merged_rank(ModuleShape(d_out, d_in, tuple(ranks)))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_a_zero_update_has_zero_joint_coordinates_wherever_it_stands(place: int, direction: str) -> None:
    updates = random_updates(40, 30, [3, 4])
    updates.insert(place, LowRankUpdate(torch.zeros(40, 5), random_update(40, 30, 5, 9).a))
    part = JointSpace(JointParams(direction=direction)).encode(updates, (1.0,) * 3).parts[0]
    for block in part.blocks():
        assert not block[place].any()
        assert all(block[t].any() for t in range(3) if t != place)


def dense_of(updates: list[LowRankUpdate]) -> list[InputUpdate]:
    return [StreamedUpdate.of(densify(u)) for u in updates]


def test_delta_and_joint_take_dense_updates() -> None:
    assert {name for name, space in ALL.items() if space.takes_dense} == {"delta", "joint", "joint vertical"}


@pytest.mark.parametrize("space", [CoreSpace(SpaceParams()), FactorSpace(SpaceParams()), TuckerSpace(TuckerParams())])
def test_the_others_refuse_them_by_name(space: Space) -> None:
    with pytest.raises(StrategyError, match=f"'{space.name}' works on the factors"):
        space.encode(dense_of(random_updates(6, 5, [2, 2])), [1.0, 1.0])


def test_delta_coordinates_of_mixed_updates_are_their_rows() -> None:
    low = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, -1.0]]), 3.0)
    dense = StreamedUpdate.of(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).scaled(-1.0)
    part = DeltaSpace(SpaceParams()).encode([low, dense], [1.0, 1.0]).parts[0]
    assert torch.equal(part.read(slice(1, 2)), torch.tensor([[[6.0, 0.0, -6.0]], [[-4.0, -5.0, -6.0]]]))
    assert part.is_computed


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_joint_coordinates_of_dense_updates_are_those_of_their_factors(
    direction: str, case: tuple[int, int, list[int]]
) -> None:
    space = JointSpace(JointParams(direction=direction, rank_tolerance=1e-6))
    updates = random_updates(*case, dtype=torch.float64)
    weights = [1.0] * len(updates)
    low, dense = space.encode(updates, weights), space.encode(dense_of(updates), weights)
    assert isinstance(low, JointCoordinates)
    assert isinstance(dense, JointCoordinates)
    assert low.parts[0].shape == dense.parts[0].shape
    scale = low.joint.right_norms() + 0.5
    for mine, own in ((low.parts[0], dense.parts[0]), (low.part(scale), dense.part(scale))):
        whole = [p.read(slice(0, p.shape[p.axis])) for p in (mine, own)]
        torch.testing.assert_close(whole[1], whole[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_joint_results_of_dense_updates_are_dense(direction: str) -> None:
    coordinates = JointSpace(JointParams(direction=direction)).encode(
        dense_of(random_updates(8, 7, [2, 1])), [1.0, 1.0]
    )
    assert isinstance(coordinates.decode([coordinates.parts[0].merged(lambda block: block[0])]), DenseUpdate)


@in_all
def test_other_weights_share_what_does_not_depend_on_them(space: Space) -> None:
    coordinates = space.encode(random_updates(6, 5, [2, 3]), [1.0, 1.0])
    other = space.reweighted(coordinates, [2.0, -1.0])
    (mine, *_), (own, *_) = coordinates.parts, other.parts
    assert (other.weights, coordinates.weights) == ((2.0, -1.0), (1.0, 1.0))
    if not isinstance(space, FactorSpace):
        assert own.read is mine.read
        assert own.weights == (2.0, -1.0)


def test_other_weights_enter_a_joint_part_made_later() -> None:
    space = JointSpace(JointParams())
    for updates in (random_updates(6, 5, [2, 3]), dense_of(random_updates(6, 5, [2, 3]))):
        other = space.reweighted(space.encode(updates, [1.0, 1.0]), [2.0, -1.0])
        assert isinstance(other, JointCoordinates)
        assert other.part(other.joint.right_norms()).weights == (2.0, -1.0)


def test_a_dense_input_has_no_factors() -> None:
    shape = ModuleShape(64, 48, (48, 8), dense=1)
    assert (shape.inputs, shape.joint_rank, shape.factor_entries) == (2, 56, 8 * 112)


@pytest.mark.parametrize("space", [space for space in ALL.values() if space.takes_dense])
def test_of_dense_inputs_only_blocks_and_square_matrices_stay_in_memory(space: Space) -> None:
    for long in (ModuleShape(2048, 65536, (2048,) * 4, dense=4), ModuleShape(65536, 2048, (2048,) * 4, dense=4)):
        held = space.working_entries(long) - space.scratch_entries(long)
        side = long.inputs * 2048 if isinstance(space, JointSpace) else 0
        assert 0 < held < 9 * side**2 + 12 * (1 << 20)
        assert space.scratch_entries(long) >= 2 * long.d_out * long.d_in
