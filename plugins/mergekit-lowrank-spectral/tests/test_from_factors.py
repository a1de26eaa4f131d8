"""What holds for the family: only small matrices are decomposed, and only the product of the factors matters."""

from __future__ import annotations

import mergekit_lowrank_spectral
import pytest
import torch
from torch import Tensor

from mergekit_lowrank import LowRankUpdate, Registry, Strategy
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.testing import merge_updates, random_updates

ALL = mergekit_lowrank_spectral.strategies()
OF_UPDATES = [kind for kind in ALL if kind.name != "lora_lego"]

each = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
each_of_updates = pytest.mark.parametrize("kind", OF_UPDATES, ids=lambda kind: kind.name)


def registry() -> Registry:
    found = Registry()
    found.register(mergekit_lowrank_spectral, "spectral")
    return found


def merged(kind: type[Strategy], updates: list[LowRankUpdate]) -> Tensor:
    space = registry().spaces[kind.spaces[0]]
    return densify(merge_updates(kind(kind.Params()), space(space.Params()), updates))


def test_the_plugin_registers_its_methods() -> None:
    assert registry().plugins[-1].registers == {"strategies": ("tsv", "iso_c", "iso_cts", "cart", "star", "lora_lego")}


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of all matrices whose singular values are computed."""
    shapes: list[tuple[int, int]] = []
    original = torch.linalg.svd

    def recorded(matrix: Tensor, **options: bool) -> tuple[Tensor, Tensor, Tensor]:
        shapes.append((matrix.shape[0], matrix.shape[1]))
        found: tuple[Tensor, Tensor, Tensor] = original(matrix, **options)
        return found

    monkeypatch.setattr(torch.linalg, "svd", recorded)
    return shapes


@each_of_updates
def test_no_matrix_larger_than_the_joint_rank_is_decomposed(
    kind: type[Strategy], decomposed: list[tuple[int, int]]
) -> None:
    merged(kind, random_updates(50, 40, [3, 2, 4]))
    assert decomposed
    assert max(max(shape) for shape in decomposed) <= 9


@each_of_updates
def test_the_gauge_of_the_factors_does_not_matter(kind: type[Strategy]) -> None:
    updates = random_updates(12, 10, [2, 3, 2], scalings=[1.0, 2.0, 0.5], dtype=torch.float64)
    turned = []
    for seed, update in enumerate(updates):
        turn = torch.randn(update.rank, update.rank, generator=torch.Generator().manual_seed(seed)).double()
        turned.append(LowRankUpdate(update.b @ turn * 3, torch.linalg.solve(turn, update.a), update.scaling / 3))
    torch.testing.assert_close(merged(kind, turned), merged(kind, updates))


@each_of_updates
def test_the_sides_may_be_smaller_than_the_joint_rank(kind: type[Strategy]) -> None:
    for shape in ((4, 30), (30, 4), (3, 3)):
        found = merged(kind, random_updates(*shape, [3, 2, 4], dtype=torch.float64))
        assert 0 < float(found.norm()) < 1e3


@each
def test_the_inputs_may_be_scaled_together(kind: type[Strategy]) -> None:
    updates = random_updates(12, 10, [2, 3, 2], dtype=torch.float64)
    for factor in (1e-6, 1e6):
        found = merged(kind, [u.scaled(factor) for u in updates])
        torch.testing.assert_close(found / factor, merged(kind, updates))


@pytest.mark.parametrize("name", ["tsv", "iso_c", "star", "lora_lego"])
def test_zero_padding_of_the_factors_changes_nothing(name: str) -> None:
    (kind,) = (kind for kind in ALL if kind.name == name)
    updates = random_updates(12, 10, [2, 2], dtype=torch.float64)
    padded = [
        LowRankUpdate(torch.nn.functional.pad(u.b, (0, 2)), torch.nn.functional.pad(u.a, (0, 0, 0, 2))) for u in updates
    ]
    torch.testing.assert_close(merged(kind, padded), merged(kind, updates))
