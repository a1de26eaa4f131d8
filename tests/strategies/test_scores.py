"""SCE, consensus and PCB, against the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.spaces import base as spaces_base
from mergekit_lowrank.strategies import Consensus, MergeContext, Pcb, Sce, Strategy
from mergekit_lowrank.testing import merge_modules, merge_updates, random_updates
from tests.strategies import dense

DELTA = DeltaSpace(SpaceParams())


def exactly(delta: Tensor) -> LowRankUpdate:
    return LowRankUpdate(delta, torch.eye(delta.shape[1], dtype=delta.dtype))


def merged(kind: type[Strategy], *deltas: Tensor, weights: list[float] | None = None, **parameters: Any) -> Tensor:
    strategy = kind(kind.Params(**parameters))
    return densify(merge_updates(strategy, DELTA, [exactly(d) for d in deltas], weights))


def random_deltas(count: int, seed: int, size: tuple[int, int] = (4, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]


# Consensus


def test_consensus_by_hand() -> None:
    # The last entry matters to the first alone; the others to both.
    found = merged(Consensus, torch.tensor([[1.0, -2.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert found.tolist() == [[2.0, -1.0, 0.0]]


def test_agreement_one_keeps_what_matters_to_one_alone() -> None:
    found = merged(Consensus, torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0]]), agreement=1)
    assert found.tolist() == [[2.0, 5.0]]


def test_one_input_alone_comes_back() -> None:
    (delta,) = random_deltas(1, 0)
    assert torch.equal(merged(Consensus, delta), delta)


@pytest.mark.parametrize(("copies", "vanishes"), [(3, False), (4, True)])
def test_copies_vanish_once_lambda_times_the_others_reaches_one(copies: int, vanishes: bool) -> None:
    (delta,) = random_deltas(1, 0)
    found = merged(Consensus, *[delta] * copies, mask_threshold=0.4)
    assert bool((found == 0).all()) == vanishes


@given(
    count=st.integers(1, 5),
    threshold=st.floats(0.1, 2.0),
    agreement=st.integers(1, 6),
    weights=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_consensus_equals_the_formula(
    count: int, threshold: float, agreement: int, weights: list[float], seed: int
) -> None:
    deltas = random_deltas(count, seed)
    found = merged(Consensus, *deltas, weights=weights[:count], mask_threshold=threshold, agreement=agreement)
    stacked = torch.stack(deltas).numpy()
    expected = dense.consensus(stacked, weights[:count], threshold, agreement)
    # Where a comparison is decided by rounding either side is right; with random entries none is.
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_each_input_may_have_a_threshold_of_its_own() -> None:
    updates = [exactly(torch.tensor([[1.0]])), exactly(torch.tensor([[1.0]]))]
    strategy = Consensus(Consensus.Params())
    for own, expected in (({}, 2.0), ({"mask_threshold": 1.5}, 0.0)):
        context = MergeContext("m", (0, 1), (1.0, 1.0), 2.0, ({}, own))
        assert densify(strategy.merge(DELTA.encode(updates, (1.0, 1.0)), context)).tolist() == [[expected]]


# PCB


@given(
    count=st.integers(1, 4),
    density=st.floats(0.05, 1.0),
    winsorize=st.sampled_from([0.0, 1e-4, 0.01, 0.1]),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_pcb_equals_the_formula(count: int, density: float, winsorize: float, weights: list[float], seed: int) -> None:
    deltas = random_deltas(count, seed)
    found = merged(Pcb, *deltas, weights=weights[:count], density=density, winsorize=winsorize)
    rows = torch.stack([d.flatten() for d in deltas]).numpy()
    expected = dense.pcb(rows, weights[:count], density, winsorize)
    np.testing.assert_allclose(found.flatten().numpy(), expected, atol=1e-9)


def test_pcb_keeps_the_stated_share() -> None:
    (delta,) = random_deltas(1, 3, (20, 50))
    # Scores at the order statistic itself become zero.
    assert int((merged(Pcb, delta, density=0.1) != 0).sum()) == 99


def test_pcb_of_model_scope_equals_flattening_all_modules() -> None:
    modules = {"a": random_updates(6, 8, [2, 3], 1), "b": random_updates(5, 4, [1, 2], 2)}
    strategy = Pcb(Pcb.Params(scope="model", density=0.3, winsorize=0.05))
    found = merge_modules(strategy, DELTA, modules, [1.0, 0.7])
    flat = [torch.cat([densify(modules[name][t]).flatten() for name in modules]).view(1, -1) for t in range(2)]
    expected = merged(Pcb, *flat, weights=[1.0, 0.7], density=0.3, winsorize=0.05).flatten()
    torch.testing.assert_close(torch.cat([densify(found[name]).flatten() for name in modules]), expected)


@pytest.mark.parametrize("count", [2, 100])
def test_pcb_does_not_overflow_with_many_inputs(count: int) -> None:
    deltas = [d.float() for d in random_deltas(count, 5)]
    found = merged(Pcb, *deltas)
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) > 0


def test_scores_that_are_all_one_are_all_kept() -> None:
    # The code divides 0 by 0 here.
    found = merged(Pcb, torch.ones(3, 4), torch.ones(3, 4))
    assert bool((found == 1).all())


def test_a_part_with_fewer_entries_than_one_over_the_density_keeps_its_highest_score() -> None:
    found = merged(Pcb, torch.tensor([[1.0, 3.0, -2.0]]), density=0.1)
    assert found.tolist() == [[0.0, 2.0, -2.0]] or found.count_nonzero() == 1


# SCE


def test_sce_by_hand() -> None:
    # Energies 4 and 16 (means over two entries 2.5 and 8.5 after no selection): shares 5/22 and 17/22.
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 4.0]])
    shares = torch.tensor([5.0, 17.0]) / 22
    expected = [1.0, float(shares[0] * 2 + shares[1] * 4)]
    torch.testing.assert_close(merged(Sce, first, second), torch.tensor([expected]))


def test_sce_selects_where_the_inputs_differ_most() -> None:
    first, second = torch.tensor([[1.0, 5.0, 3.0, 1.0]]), torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    found = merged(Sce, first, second, select_topk=0.34)
    assert found[0].nonzero().flatten().tolist() == [1]


def test_sce_weighs_by_energy_at_any_scale() -> None:
    # mergekit falls back to equal shares where the mean squares add up to less than 1e-6, as those of adapters do.
    first, second = random_deltas(2, 1)
    torch.testing.assert_close(merged(Sce, first * 1e-6, second * 1e-6), merged(Sce, first, second) * 1e-6)


def test_equal_inputs_leave_nothing_to_select() -> None:
    (delta,) = random_deltas(1, 2)
    torch.testing.assert_close(merged(Sce, delta, delta, select_topk=0.5), delta)


@pytest.mark.parametrize("kind", [Sce, Consensus, Pcb])
@pytest.mark.parametrize("entries", [1, 30])
def test_blocks_of_any_size_give_equal_values(
    kind: type[Strategy], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = random_updates(9, 7, [2, 3, 1], dtype=torch.float64)
    parameters = {"select_topk": 0.4} if kind is Sce else {}
    strategy = kind(kind.Params(**parameters))
    expected = densify(merge_updates(strategy, DELTA, updates))
    monkeypatch.setattr(spaces_base, "BLOCK_ENTRIES", entries)
    torch.testing.assert_close(densify(merge_updates(strategy, DELTA, updates)), expected)
