"""What every space owes the strategies that work in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.api import merge
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, densify, scratch_space
from mergekit_lowrank.spaces import Coordinates, ModuleShape, Space
from mergekit_lowrank.testing.checks import (
    CASES,
    GROWING,
    MEMORY_SLACK_BYTES,
    assert_close,
    assert_documented,
    assert_parameters_are_described,
    assert_sound,
    devices,
    from_threads,
    settings,
    shape_of,
    snapshot,
    streamed,
    views,
)
from mergekit_lowrank.testing.contract import Contract
from mergekit_lowrank.testing.makers import random_update, random_updates, write_tiny_adapter
from mergekit_lowrank.testing.memory import held

__all__ = ["SpaceContract"]

COEFFICIENTS = (1.5, -0.5, 2.0)
MEASURED = {
    "few large": ModuleShape(768, 1024, (16, 16, 8)),
    "many ranks": ModuleShape(640, 512, (32,) * 6),
    "dense": ModuleShape(256, 8192, (256, 256), dense=2),
    "dense and tall": ModuleShape(8192, 256, (256, 256), dense=2),
    "mixed": ModuleShape(1024, 1536, (1024, 8, 16), dense=1),
}


class SpaceContract(Contract):
    """The tests of a space.

    Inherit it and name the space::

        class TestOutput(SpaceContract):
            plugin = my_plugin
            space = "output"

    Attributes:
        plugin: the module or object with the hooks; left out, names are looked up in what is installed.
        space: by its name, or a class that no plugin registers.
        parameters: what replaces defaults of the space; those that make a lossy space as exact as it can be.
        tolerance: relative, for results in float64 that should be equal to rounding.
    """

    space: ClassVar[str | type[Space]] = ""
    parameters: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-8

    @classmethod
    def alone(cls) -> dict[str, Any]:
        """The space, where its class is given in place of a name."""
        return {} if isinstance(cls.space, str) else {"spaces": cls.space}

    @classmethod
    def kind(cls) -> type[Space]:
        """The space's class."""
        return cls.registry().space(cls.space if isinstance(cls.space, str) else cls.space.name)

    def made(self, **parameters: Any) -> Space:
        """The space with its parameters."""
        return self.kind()(self.kind().Params(**{**self.parameters, **parameters}))

    def encoded(self, updates: Sequence[InputUpdate], weights: Sequence[float] | None = None) -> Coordinates:
        """The coordinates of updates, all of weight 1 unless given."""
        return self.made().encode(updates, weights if weights is not None else (1.0,) * len(updates))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test on every device where it asks for one."""
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", devices(metafunc))

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_one_update_comes_back_at_its_weight(self, case: tuple[int, int, tuple[int, ...]]) -> None:
        d_out, d_in, ranks = case
        for rank in ranks:
            update = random_update(d_out, d_in, rank, scaling=2.0, dtype=torch.float64)
            for weight in (1.0, -0.7):
                found = _weighted_sum(self.encoded([update], [weight]))
                message = f"one update of rank {rank} at weight {weight}"
                assert_close(found, weight * densify(update), self.tolerance, message)

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_weighted_coordinates_are_those_of_the_weighted_sum_where_the_space_is_linear(
        self, case: tuple[int, int, tuple[int, ...]]
    ) -> None:
        d_out, d_in, ranks = case
        weights = COEFFICIENTS[: len(ranks)]
        scalings = [0.5 + t for t in range(len(ranks))]
        updates = random_updates(d_out, d_in, ranks, scalings=scalings, dtype=torch.float64)
        coordinates = self.encoded(updates, weights)
        if coordinates.is_linear:
            expected = torch.stack([w * densify(u) for w, u in zip(weights, updates, strict=True)]).sum(dim=0)
            found = _weighted_sum(coordinates)
            assert_close(found, expected, self.tolerance, "is_linear, but Σ w x does not decode to Σ w ΔW")

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_dense_updates_decode_to_their_weighted_sum(self, case: tuple[int, int, tuple[int, ...]]) -> None:
        if not self.kind().takes_dense:
            return
        d_out, d_in, ranks = case
        updates = [u.scaled(-2.0) for u in random_updates(d_out, d_in, ranks, dtype=torch.float64)]
        dense: list[InputUpdate] = [StreamedUpdate.of(densify(u) / 4).scaled(4.0) for u in updates]
        weights = COEFFICIENTS[: len(ranks)]
        expected = torch.stack([w * densify(u) for w, u in zip(weights, updates, strict=True)]).sum(dim=0)
        for given in (dense, [*dense[:1], *updates[1:]], [*updates[:1], *dense[1:]]):
            coordinates = self.encoded(given, weights)
            assert_sound(coordinates.decode([part.merged(lambda x: x[0]) for part in coordinates.parts]), dense[0])
            if coordinates.is_linear:
                found = _weighted_sum(coordinates)
                assert_close(found, expected, self.tolerance, "dense updates, all or some")

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_coordinates_and_results_are_finite_and_keep_type_and_device(
        self, case: tuple[int, int, tuple[int, ...]], device: str
    ) -> None:
        d_out, d_in, ranks = case
        for dtype in (torch.float32, torch.float64):
            updates = [u.to(device, dtype) for u in random_updates(d_out, d_in, ranks, dtype=dtype)]
            coordinates = self.encoded(updates)
            for part in coordinates.parts:
                for block in part.blocks():
                    assert (block.dtype, block.device) == (updates[0].b.dtype, updates[0].b.device)
                    assert bool(block.isfinite().all()), f"coordinates of part '{part.name}' are not finite"
            assert_sound(coordinates.decode([part.merged(lambda x: x[0]) for part in coordinates.parts]), updates[0])

    def test_parts_say_what_their_blocks_hold(self) -> None:
        updates = random_updates(7, 9, (2, 3, 1), scalings=(1.0, -0.5, 2.0))
        coordinates = self.encoded(updates, COEFFICIENTS)
        assert [id(update) for update in coordinates.updates] == [id(update) for update in updates]
        assert coordinates.weights == COEFFICIENTS
        for part in coordinates.parts:
            whole = part.read(slice(0, part.shape[part.axis]))
            assert whole.shape == (3, *part.shape), f"part '{part.name}': blocks of {tuple(whole.shape)}"
            assert (whole.dtype, whole.device) == (part.dtype, part.device)
            assert len(part.weights) == len(part.sizes) == 3
            assert all(0 <= size <= part.entries for size in part.sizes), f"part '{part.name}': sizes {part.sizes}"

    def test_blocks_are_slices_of_one_matrix_however_often_and_in_whatever_order_they_are_read(self) -> None:
        for part in self.encoded(random_updates(7, 9, (2, 3), dtype=torch.float64)).parts:
            length, axis = part.shape[part.axis], part.axis + 1
            whole = part.read(slice(0, length)).clone()
            cuts = [slice(length // 2, length), slice(0, length // 2), slice(0, length // 2)]
            for cut, block in [(cut, part.read(cut)) for cut in cuts]:
                expected = whole.narrow(axis, cut.start, cut.stop - cut.start)
                torch.testing.assert_close(block, expected, msg=f"part '{part.name}', {cut}")

    def test_other_weights_give_the_coordinates_of_a_new_encoding(self) -> None:
        updates = random_updates(7, 9, (2, 3, 1), scalings=(1.0, -0.5, 2.0), dtype=torch.float64)
        for given in (updates, streamed(updates)) if self.kind().takes_dense else (updates,):
            first = self.encoded(given)
            found, expected = self.made().reweighted(first, COEFFICIENTS), self.encoded(given, COEFFICIENTS)
            assert (found.weights, first.weights) == (COEFFICIENTS, (1.0,) * 3)
            assert [id(update) for update in found.updates] == [id(update) for update in given]
            assert torch.equal(_weighted_sum(found), _weighted_sum(expected)), "reweighted gives other values"
            for part, other in zip(found.parts, expected.parts, strict=True):
                assert (part.weights, part.shares, part.sizes) == (other.weights, other.shares, other.sizes)

    def test_updates_are_not_modified(self) -> None:
        updates = random_updates(7, 9, (2, 3), dtype=torch.float64)
        before = [tensor.clone() for u in updates for tensor in (u.b, u.a)]
        coordinates = self.encoded(updates)
        blocks = snapshot(coordinates)
        _weighted_sum(coordinates)
        after = snapshot(coordinates)
        same = [torch.equal(a, b) for a, b in zip(before + blocks, after[: len(before)] + after, strict=True)]
        assert all(same), "encoding, reading or decoding changed the updates or their coordinates"

    def test_updates_need_not_be_contiguous(self) -> None:
        updates = random_updates(7, 9, (2, 3), dtype=torch.float64)
        found, expected = (_weighted_sum(self.encoded(given)) for given in (views(updates), updates))
        assert_close(found, expected, self.tolerance, "updates that are not contiguous")

    def test_the_same_updates_give_the_same_bits_in_several_threads(self) -> None:
        modules = [random_updates(7 + i, 9, (2, 3), i) for i in range(8)]
        space = self.made()

        def work(updates: Sequence[InputUpdate]) -> Tensor:
            return _weighted_sum(space.encode(updates, (1.0, 1.0)))

        alone = [work(updates) for updates in modules]
        together = from_threads([lambda own=updates: work(own) for updates in modules])  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), "other bits in several threads"

    def test_one_module_may_be_read_from_several_threads(self) -> None:
        coordinates = self.encoded(random_updates(17, 9, (2, 3)))
        together = from_threads([lambda: _weighted_sum(coordinates)] * 8)
        assert all(torch.equal(together[0], other) for other in together), "blocks differ between threads"

    @pytest.mark.parametrize("zero", ["a", "b", "both"])
    def test_zero_updates_decode_to_zero(self, zero: str) -> None:
        updates = [LowRankUpdate(u.b * (zero == "a"), u.a * (zero == "b")) for u in random_updates(7, 9, (2, 3))]
        assert torch.equal(_weighted_sum(self.encoded(updates)), torch.zeros(7, 9))

    def test_an_update_without_full_rank_comes_back(self) -> None:
        update = random_update(7, 9, 3, dtype=torch.float64)
        b = torch.cat([update.b, update.b[:, :1]], dim=1)  # rank 3, in factors of rank 4
        repeated = LowRankUpdate(b, torch.cat([update.a, torch.zeros(1, 9, dtype=torch.float64)]))
        assert_close(_weighted_sum(self.encoded([repeated])), densify(update), self.tolerance, "rank 3 in 4 columns")

    def test_an_update_given_twice_has_equal_coordinates(self) -> None:
        update = random_update(7, 9, 3, dtype=torch.float64)
        coordinates = self.encoded([update, update], [0.5, 0.5])
        for part in coordinates.parts:
            for block in part.blocks():
                torch.testing.assert_close(block[0], block[1], msg=f"part '{part.name}'")
        if coordinates.is_linear:
            assert_close(_weighted_sum(coordinates), densify(update), self.tolerance, "twice an update at weight 1/2")

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_no_result_exceeds_the_rank_that_the_space_states(self, case: tuple[int, int, tuple[int, ...]]) -> None:
        d_out, d_in, ranks = case
        updates = random_updates(d_out, d_in, ranks, dtype=torch.float64)
        coordinates, generator = self.encoded(updates), torch.Generator().manual_seed(0)
        # Whatever a strategy makes of them: entries that have nothing to do with each other.
        merged = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in coordinates.parts]
        rank = int(torch.linalg.matrix_rank(densify(coordinates.decode(merged)), rtol=1e-9))
        bound = self.made().merged_rank(shape_of(updates))
        assert rank <= bound, f"a result has rank {rank}, and merged_rank says {bound} at most"

    def test_every_choice_and_bound_of_a_parameter_gives_finite_values(self) -> None:
        updates = random_updates(7, 9, (2, 3, 1))
        for given in settings(self.kind().Params):
            coordinates = self.made(**given).encode(updates, COEFFICIENTS)
            assert_sound(coordinates.decode(list(_sums(coordinates))), updates[0])

    def test_memory_estimates_grow_with_the_module(self) -> None:
        found = [self.made().working_entries(shape) for shape in GROWING]
        assert found[0] > 0
        assert found == sorted(found), f"working_entries falls while the module grows: {found}"
        in_scratch = [self.made().scratch_entries(shape) for shape in GROWING]
        assert all(0 <= part <= whole for part, whole in zip(in_scratch, found, strict=True)), (
            f"scratch_entries are {in_scratch}, of working_entries {found}"
        )

    @pytest.mark.parametrize("shape", MEASURED.values(), ids=MEASURED)
    def test_memory_stays_below_the_estimate(self, shape: ModuleShape, tmp_path: Path) -> None:
        if shape.dense and not self.kind().takes_dense:
            return
        updates = _inputs(shape)
        _read_through(self.encoded(_inputs(ModuleShape(7, 9, (7, 3), dense=min(shape.dense, 1)))))  # imports and caches
        working, in_scratch = self.made().working_entries(shape), self.made().scratch_entries(shape)
        whole = held(lambda: _read_through(self.encoded(updates))).peak_bytes
        with scratch_space(tmp_path, 0):
            rest = held(lambda: _read_through(self.encoded(updates))).peak_bytes
        for peak, entries, name in ((whole, working, ""), (rest, working - in_scratch, " − scratch_entries")):
            estimate = entries * torch.float32.itemsize
            assert peak <= estimate + MEMORY_SLACK_BYTES, (
                f"the coordinates of {shape} held {peak / 2**20:.1f} MiB; "
                f"working_entries{name} says {estimate / 2**20:.1f} MiB at most"
            )

    def test_parameters_are_described_and_strict(self) -> None:
        assert_parameters_are_described(self.kind().Params)

    def test_the_space_is_documented(self) -> None:
        assert_documented(self.kind(), self.kind())

    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_element_wise_methods_merge_adapters_in_it(self, method: str, tmp_path: Path) -> None:
        modules = {"layers.0.q_proj": (6, 5), "layers.1.down_proj": (5, 8)}
        paths = [write_tiny_adapter(tmp_path / str(rank), modules, rank=rank, seed=rank) for rank in (2, 3)]
        models = [{"model": str(path)} for path in paths]
        recipe = {"merge_method": method, "space": self.kind().name, "models": models}
        merged = merge(recipe, registry=self.registry())
        assert merged.report.totals.merged_norm > 0


def _weighted_sum(coordinates: Coordinates) -> Tensor:
    """The dense update whose coordinates are Σ w_t x_t, the weights being those of each part."""
    return densify(coordinates.decode(list(_sums(coordinates))))


def _sums(coordinates: Coordinates) -> Iterator[Tensor]:
    for part in coordinates.parts:
        weights = torch.tensor(part.weights, dtype=part.dtype, device=part.device).view(-1, 1, 1)
        yield part.merged(partial(_weighted, weights))


def _weighted(weights: Tensor, block: Tensor) -> Tensor:
    return (block * weights).sum(dim=0)


def _read_through(coordinates: Coordinates) -> object:
    """What a merge without temporaries of its own does: every block read and summed, the sums decoded and scaled."""
    return coordinates.decode([part.merged(lambda block: block.sum(dim=0)) for part in coordinates.parts]).scaled(0.5)


def _inputs(shape: ModuleShape) -> list[InputUpdate]:
    """Updates of this shape, the first ones dense and of full rank."""
    low = random_updates(shape.d_out, shape.d_in, shape.ranks[shape.dense :])
    matrices = torch.randn(shape.dense, shape.d_out, shape.d_in, generator=torch.Generator().manual_seed(0))
    return [*map(StreamedUpdate.of, matrices), *low]
