from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.policies import Offer, least_rank, snapped, spread

A = Offer((16.0, 9.0, 1.0), 10)
B = Offer((100.0, 20.0, 8.0), 40)


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (50, [1, 1]),  # what each has in any case
        (59, [1, 1]),
        (60, [2, 1]),  # 0.9 a byte, before 0.5
        (69, [2, 1]),
        (99, [3, 1]),  # 0.5 a byte for B's second does not fit, and A's third at 0.1 does
        (100, [2, 2]),
        (139, [3, 2]),
        (140, [2, 3]),
        (150, [3, 3]),
        (10**9, [3, 3]),  # there is no more to buy
    ],
)
def test_what_keeps_most_for_a_byte_is_bought_first(budget: int, ranks: list[int]) -> None:
    assert spread([A, B], budget) == ranks


def test_equal_ratios_go_by_the_order_of_modules_then_of_directions() -> None:
    flat = Offer((1.0, 1.0, 1.0), 10)
    assert [spread([flat, flat], budget) for budget in (20, 30, 40, 50, 60)] == [[1, 1], [2, 1], [3, 1], [3, 2], [3, 3]]


def test_a_module_of_zeros_has_one_direction() -> None:
    assert spread([Offer((), 10), Offer((4.0, 1.0), 10)], 1000) == [1, 2]


def test_steps_to_accepted_ranks_cost_all_of_their_rows() -> None:
    wide = Offer((9.0, 4.0, 4.0, 4.0, 1.0), 10)
    narrow = Offer((9.0, 5.0), 10)
    # From 1 to 4: 12 for 30 bytes, and 5 for 30 bytes where two of the rows would be zeros.
    assert spread([narrow, wide], 20, (1, 4, 8)) == [1, 1]
    assert spread([narrow, wide], 50, (1, 4, 8)) == [1, 4]
    assert spread([narrow, wide], 80, (1, 4, 8)) == [4, 4]
    assert spread([narrow, wide], 10**6, (1, 4, 8)) == [4, 8]
    assert spread([narrow, wide], 10**6, (4,)) == [4, 4]


@pytest.mark.parametrize(("accepted", "rank"), [((), 1), ((1, 8), 1), ((4, 8), 4)])
def test_the_least_rank_is_one_or_the_least_accepted(accepted: tuple[int, ...], rank: int) -> None:
    assert least_rank(accepted) == rank


offers = st.lists(
    st.builds(
        Offer,
        st.lists(st.integers(1, 50).map(float), max_size=4).map(lambda values: tuple(sorted(values, reverse=True))),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=4,
)


def cost(offers: list[Offer], ranks: list[int] | tuple[int, ...]) -> int:
    return sum(rank * offer.bytes_per_rank for rank, offer in zip(ranks, offers, strict=True))


def kept(offers: list[Offer], ranks: list[int] | tuple[int, ...]) -> float:
    return sum(sum(offer.energies[:rank]) for rank, offer in zip(ranks, offers, strict=True))


@given(offers, st.integers(0, 60), st.sampled_from([(), (1, 2, 4), (2, 3)]))
def test_a_budget_is_kept_and_misses_the_optimum_by_less_than_one_step(
    offers: list[Offer], extra: int, accepted: tuple[int, ...]
) -> None:
    first = least_rank(accepted)
    budget = cost(offers, [first] * len(offers)) + extra
    ranks = spread(offers, budget, accepted)
    assert cost(offers, ranks) <= budget
    assert all(rank in (accepted or range(1, 5)) for rank in ranks)
    choices = product(accepted or range(1, 5), repeat=len(offers))
    best = max(kept(offers, choice) for choice in choices if cost(offers, choice) <= budget)
    next_steps = [
        sum(offer.energies[rank : snapped(rank + 1, accepted)]) for offer, rank in zip(offers, ranks, strict=True)
    ]
    assert kept(offers, ranks) >= best - max(next_steps) - 1e-9


@given(offers, st.integers(0, 60))
def test_one_more_direction_of_any_module_does_not_fit_or_holds_nothing(offers: list[Offer], extra: int) -> None:
    budget = cost(offers, [1] * len(offers)) + extra
    ranks = spread(offers, budget)
    left = budget - cost(offers, ranks)
    for offer, rank in zip(offers, ranks, strict=True):
        assert rank >= len(offer.energies) or offer.bytes_per_rank > left
