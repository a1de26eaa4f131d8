from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.strategies import (
    Drm,
    ElementwiseStrategy,
    MergeContext,
    Params,
    Preset,
    RobustMerge,
    Ties,
    keyed_generator,
    per_input,
)
from mergekit_lowrank.testing import merge_updates, random_updates


class HalfParams(Params):
    share: float = per_input(0.5, ge=0, le=1, description="of each input")
    offset: float = 0.0


class Half(ElementwiseStrategy):
    name = "half"
    summary = "half of the sum"
    Params = HalfParams

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        return (block * weights).sum(dim=0) / 2


def context(**changes: Any) -> MergeContext:
    return MergeContext(
        **{"module": "m", "participants": (0, 2), "weights": (1.0, 2.0), "total_weight": 4.0, **changes}
    )


def test_one_function_of_a_block_makes_a_method() -> None:
    updates = random_updates(5, 4, [2, 2], dtype=torch.float64)
    merged = merge_updates(Half(HalfParams()), DeltaSpace(SpaceParams()), updates, [1.0, 3.0])
    torch.testing.assert_close(densify(merged), (densify(updates[0]) + 3 * densify(updates[1])) / 2)


def test_a_method_without_a_merging_function_says_what_is_missing() -> None:
    class Nothing(ElementwiseStrategy):
        name = "nothing"
        summary = "nothing"

    with pytest.raises(NotImplementedError, match="Nothing must implement merge_block or merge_part"):
        merge_updates(Nothing(Params()), DeltaSpace(SpaceParams()), random_updates(5, 4, [2]))


def test_parameters_that_each_input_may_have_are_known_by_name() -> None:
    assert HalfParams.per_input_names() == {"share"}
    assert Ties.Params.per_input_names() == {"density"}
    assert RobustMerge.Params.per_input_names() == frozenset()


def test_each_gives_the_shared_value_where_an_input_has_none_of_its_own() -> None:
    params = HalfParams(share=0.3)
    assert context().each(params, "share") == (0.3, 0.3)
    assert context(input_params=({}, {"share": 0.9})).each(params, "share") == (0.3, 0.9)


def test_random_numbers_depend_on_seed_module_and_input_only() -> None:
    def drawn(ctx: MergeContext, position: int) -> list[float]:
        return torch.rand(4, generator=ctx.generator(position)).tolist()

    same = drawn(context(), 1)
    assert drawn(context(participants=(2,), weights=(9.0,)), 0) == same
    assert drawn(context(), 0) != same
    assert drawn(context(seed=1), 1) != same
    assert drawn(context(module="n"), 1) != same


def test_a_keyed_generator_gives_the_same_numbers_on_every_machine() -> None:
    found = torch.randint(1000, (4,), generator=keyed_generator(0, "layers.0.q_proj", 1)).tolist()
    assert found == torch.randint(1000, (4,), generator=keyed_generator("0", "layers.0.q_proj", "1")).tolist()
    assert keyed_generator("a", "bc").initial_seed() != keyed_generator("ab", "c").initial_seed()
    assert keyed_generator(0, "layers.0.q_proj", 1).initial_seed() == 1081534306024678002


def test_a_preset_in_a_space_that_its_strategy_does_not_support_is_refused() -> None:
    with pytest.raises(StrategyError, match="preset 'x': 'drm' does not work in space 'delta'; it supports joint"):
        Preset("x", Drm, "summary", space="delta")


def test_random_words_are_keyed_as_generators_are_and_never_change() -> None:
    def words(label: str, *purpose: object, seed: int = 0) -> list[int]:
        context = MergeContext("m", (0,), (1.0,), 1.0, seed=seed, labels=(label,))
        return [int(word) for word in context.random_words(0, *purpose).random_raw(2)]

    first = words("math", "A")
    assert first == [11379472367459825781, 14648854619278515736]
    others = [words("code", "A"), words("math", "B"), words("math"), words("math", "A", seed=1)]
    assert first not in others
