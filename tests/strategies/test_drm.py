from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, densify
from mergekit_lowrank.spaces import DeltaSpace, JointParams, JointSpace, SpaceParams
from mergekit_lowrank.spaces import base as base_module
from mergekit_lowrank.strategies import Drm
from mergekit_lowrank.testing import merge_updates, random_updates
from mergekit_lowrank.testing.checks import streamed
from tests.strategies.dense import drm
from tests.strategies.methods import assert_close


def space(direction: str = "horizontal", rank_tolerance: float = 1e-2) -> JointSpace:
    return JointSpace(JointParams(direction=direction, rank_tolerance=rank_tolerance))


def merged(
    updates: Sequence[InputUpdate],
    weights: list[float] | None = None,
    direction: str = "horizontal",
    **parameters: Any,
) -> Tensor:
    return densify(merge_updates(Drm(Drm.Params(**parameters)), space(direction), updates, weights))


def row(*values: float) -> LowRankUpdate:
    return LowRankUpdate(torch.ones(1, 1), torch.tensor([values]))


APART = [
    LowRankUpdate(torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]])),
    LowRankUpdate(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 1.0, 0.0]])),
]


def test_inputs_with_directions_of_their_own_are_added_up() -> None:
    found = merged(APART, density=1.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))


def test_without_the_disjoint_mean_the_sum_is_divided_by_the_number_of_inputs() -> None:
    found = merged(APART, density=1.0, disjoint_mean=False)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def test_weights_multiply_what_was_elected() -> None:
    found = merged(APART, [0.5, -1.0], density=1.0)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.0, 0.0], [0.0, -2.0, 0.0]]))


def test_one_threshold_trims_the_renormalised_entries_of_all_inputs_together() -> None:
    # Renormalised: .6, .8, 0 and 0, 0, 1. Of 6 entries k = 6 - round(1.2) = 5, so that .8 and 1 stay, as 4 and 1.
    found = merged([row(3.0, 4.0, 0.0), row(0.0, 0.0, 1.0)], density=0.2)
    torch.testing.assert_close(found, torch.tensor([[0.0, 4.0, 1.0]]))


def test_disagreeing_entries_lose_to_the_larger_total() -> None:
    # Entries 6, 1, 0 and -2, 1, 3: the second input's -2 is outvoted, the 1s are averaged.
    found = merged([row(6.0, 1.0, 0.0), row(-2.0, 1.0, 3.0)], density=1.0)
    torch.testing.assert_close(found, torch.tensor([[6.0, 1.0, 3.0]]))


def test_copies_of_one_input_come_back_at_density_one() -> None:
    (update,) = random_updates(7, 9, [3], dtype=torch.float64)
    assert_close(merged([update] * 3, density=1.0), densify(update))


@settings(deadline=None, max_examples=25)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 999), density=st.floats(0.1, 1.0))
def test_the_vertical_form_is_the_horizontal_one_of_the_transposed_inputs(
    ranks: list[int], seed: int, density: float
) -> None:
    updates = random_updates(7, 9, ranks, seed, dtype=torch.float64)
    vertical = merged(updates, direction="vertical", density=density)
    horizontal = merged([u.transposed() for u in updates], density=density)
    assert_close(vertical, horizontal.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("zero", ["a", "b"])
@pytest.mark.parametrize("shape", [(40, 30), (200, 300)])
def test_a_zero_input_does_not_vote_nor_count_even_where_the_svd_rounds(
    dtype: torch.dtype, direction: str, zero: str, shape: tuple[int, int]
) -> None:
    updates = random_updates(*shape, [12] * 5, dtype=dtype)
    # Directions over two orders of magnitude: rounding is largest in the weakest.
    spread = [LowRankUpdate(u.b * torch.logspace(0, -2, 12, dtype=dtype), u.a) for u in updates]
    silent = LowRankUpdate(spread[1].b * (zero == "a"), spread[1].a * (zero == "b"))
    present = [spread[0], *spread[2:]]
    found = merged([spread[0], silent, *spread[2:]], direction=direction, density=1.0)
    expected = merged(present, direction=direction, density=1.0)
    # By norm: in float32 a vote or two of the sixty thousand is decided by rounding.
    assert float((found - expected).norm() / expected.norm()) < (1e-3 if dtype == torch.float32 else 1e-9)


def test_all_zero_inputs_merge_to_zero() -> None:
    zero = LowRankUpdate(torch.zeros(3, 2), torch.ones(2, 4))
    assert torch.equal(merged([zero, zero]), torch.zeros(3, 4))


def test_opposed_inputs_cancel() -> None:
    (update,) = random_updates(7, 9, [2], dtype=torch.float64)
    cancelled = merged([update, update.scaled(-1.0)], density=1.0)
    assert bool(cancelled.isfinite().all())


def test_the_result_has_at_most_the_joint_rank() -> None:
    found = merge_updates(Drm(Drm.Params()), space(), random_updates(20, 30, [2, 3]))
    assert isinstance(found, LowRankUpdate)
    assert found.rank <= 5


@pytest.mark.parametrize("kind", [list, streamed], ids=["factors", "dense"])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_blocks_of_any_size_give_equal_values(
    monkeypatch: pytest.MonkeyPatch, direction: str, kind: Callable[[list[LowRankUpdate]], list[InputUpdate]]
) -> None:
    updates = kind(random_updates(11, 7, [2, 3, 1], 3, dtype=torch.float64))
    whole = merged(updates, direction=direction, density=0.4)
    monkeypatch.setattr(base_module, "BLOCK_ENTRIES", 12)
    assert_close(merged(updates, direction=direction, density=0.4), whole)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(3, 9)),  # narrower ones tie, but for rounding
    inputs=st.integers(1, 4),
    seed=st.integers(0, 999),
    density=st.floats(0.1, 1.0),
)
def test_dense_updates_of_full_rank_merge_as_the_formula_says(
    shape: tuple[int, int], inputs: int, seed: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(inputs, *shape, generator=generator, dtype=torch.float64)
    weights = [0.5 + t for t in range(inputs)]
    found = merged([StreamedUpdate.of(delta) for delta in deltas], weights, density=density)
    assert_close(found, torch.from_numpy(drm(deltas.numpy(), weights, density)), 1e-7)


def test_drm_refuses_coordinates_of_another_space() -> None:
    with pytest.raises(StrategyError, match="'drm' works in space 'joint', not in DeltaCoordinates"):
        merge_updates(Drm(Drm.Params()), DeltaSpace(SpaceParams()), APART)
