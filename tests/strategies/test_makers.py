"""The makers of ``mergekit_lowrank.testing``, which authors of plugins use as well."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mergekit_lowrank.formats import PeftFormat
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.strategies import Linear
from mergekit_lowrank.testing import merge_updates, random_update, random_updates, write_tiny_adapter

MODULES = {"layers.0.q": (5, 3), "layers.1.q": (4, 6)}


def test_random_updates_are_the_same_for_the_same_seed_and_differ_between_inputs() -> None:
    first, second = random_updates(5, 3, [2, 2], 7)
    assert torch.equal(first.b, random_updates(5, 3, [2, 2], 7)[0].b)
    assert not torch.equal(first.b, second.b)
    assert torch.equal(random_update(5, 3, 2, 1).a, random_update(5, 3, 2, 1, dtype=torch.float64).a.float())


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({}, {"layers.0.q": (2, 2.0), "layers.1.q": (2, 2.0)}),
        ({"use_rslora": True}, {"layers.0.q": (2, 4 / math.sqrt(2)), "layers.1.q": (2, 4 / math.sqrt(2))}),
        (
            {"ranks": {"layers.1.q": 3}, "alphas": {"layers.1.q": 12.0}},
            {"layers.0.q": (2, 2.0), "layers.1.q": (3, 4.0)},
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_a_tiny_adapter_is_read_back_with_its_ranks_and_scalings(
    tmp_path: Path, variant: dict[str, object], expected: dict[str, tuple[int, float]]
) -> None:
    path = write_tiny_adapter(tmp_path / "adapter", MODULES, **variant)  # type: ignore[arg-type]
    checkpoint = PeftFormat().open(path, label="tiny")
    found = {name: (header.rank, pytest.approx(header.scaling)) for name, header in checkpoint.modules.items()}
    assert found == expected
    assert checkpoint.base_model == "tiny/base"
    assert {name: (header.d_out, header.d_in) for name, header in checkpoint.modules.items()} == MODULES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tiny_adapter_is_stored_in_the_type_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = PeftFormat().open(write_tiny_adapter(tmp_path, MODULES, dtype=dtype), label="tiny")
    assert {header.dtype for header in checkpoint.modules.values()} == {dtype}


def test_merge_updates_gives_every_input_weight_one_unless_told() -> None:
    updates = random_updates(5, 3, [2, 1])
    merged = merge_updates(Linear(Linear.Params(normalize=False)), DeltaSpace(SpaceParams()), updates)
    torch.testing.assert_close(densify(merged), densify(updates[0]) + densify(updates[1]))
