"""What every merge method owes its users."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_lowrank.api import merge
from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.formats import PeftFormat
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, densify, scratch_space
from mergekit_lowrank.spaces import ModuleShape
from mergekit_lowrank.strategies import Preset, Strategy
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
from mergekit_lowrank.testing.driver import Subject, merge_coordinates, merge_modules, merge_updates, subjects
from mergekit_lowrank.testing.makers import random_update, random_updates, write_tiny_adapter
from mergekit_lowrank.testing.memory import held

__all__ = ["StrategyContract"]

STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = {
    "uneven": (0.7, 1.1, 0.2),
    "negative": (-0.5, 1.0, -2.0),
    "with a zero": (0.0, 1.0, 1.0),
    "of sum zero": (1.0, -1.0, 0.0),
    "all zero": (0.0, 0.0, 0.0),
}
MEASURED = {
    "few large": ModuleShape(768, 1024, (16, 16, 8)),
    "many small": ModuleShape(320, 256, (4,) * 8),
    # Above what a strategy may hold of blocks, so that one matrix more is seen.
    "partly dense": ModuleShape(256, 16384, (256, 8), dense=1),
}

MODULES = {"layers.0.attn.q_proj": (6, 5), "layers.1.mlp.down_proj": (5, 8)}
FIRST, LAST = MODULES
ADAPTERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"lora_alpha": 7}),
    "patterns": ({"ranks": {FIRST: 3}, "alphas": {LAST: 12.0}}, {"ranks": {LAST: 1}}),
    "bfloat16": ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    "mixed ranks": ({"rank": 1}, {"rank": 4}),
    "one lacks a module": ({}, {"modules": {FIRST: MODULES[FIRST]}}),
}
"""Options of ``write_tiny_adapter`` for two adapters; more inputs repeat them."""


class StrategyContract(Contract):
    """The tests of a merge method, over every space that it supports.

    Inherit it and name the method::

        class TestMedian(StrategyContract):
            plugin = mergekit_lowrank_median
            method = "median"

    Attributes:
        plugin: the module or object with the hooks; left out, names are looked up in what is installed.
        method: a strategy or preset by its name.
        strategy: a class or preset that no plugin registers, in place of ``method``.
        parameters: what replaces defaults of the method in all tests but the end-to-end ones.
        tolerance: relative, for results in float64 that should be equal to rounding.
    """

    method: ClassVar[str] = ""
    strategy: ClassVar[type[Strategy] | Preset | None] = None
    parameters: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-8

    @classmethod
    def alone(cls) -> dict[str, Any]:
        """The strategy, where it is given in place of a name."""
        return {"strategies": cls.strategy} if cls.strategy is not None else {}

    @classmethod
    def preset(cls) -> Preset:
        """The method."""
        return cls.registry().method(cls.strategy.name if cls.strategy is not None else cls.method)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test in every space, and on every device where it asks for one."""
        if "subject" in metafunc.fixturenames:
            found = [
                Subject(s.preset, s.space_kind, self.parameters) for s in subjects(self.registry(), [self.preset()])
            ]
            metafunc.parametrize("subject", found, ids=[subject.space_kind.name for subject in found])
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", devices(metafunc))

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_the_result_is_finite_and_has_the_shape_type_and_device_of_the_inputs(
        self, subject: Subject, case: tuple[int, int, tuple[int, ...]], device: str
    ) -> None:
        d_out, d_in, ranks = case
        own = ranks if len(ranks) == 1 else subject.counted(ranks)
        for stored in STORED:
            computed = torch.float64 if stored is torch.float64 else torch.float32  # as a merge moves them
            updates = [u.to(device, computed) for u in random_updates(d_out, d_in, own, dtype=stored)]
            assert_sound(subject.update(updates), updates[0])

    def test_the_rank_of_the_result_stays_below_the_bound_of_the_space(self, subject: Subject) -> None:
        updates = random_updates(13, 11, subject.counted((2, 1, 1)), dtype=torch.float64)
        rank = int(torch.linalg.matrix_rank(subject.merged(updates), rtol=1e-9))
        bound = subject.space().merged_rank(shape_of(updates))
        assert rank <= bound, f"the result has rank {rank}, and merged_rank of the space says {bound} at most"

    def test_inputs_and_coordinates_are_not_modified(self, subject: Subject) -> None:
        updates = random_updates(7, 9, subject.counted((2, 3)), scalings=subject.counted((2.0, 0.5)))
        coordinates = subject.space().encode(updates, (0.5,) * len(updates))  # at weight 1 a product in place is unseen
        before = snapshot(coordinates)
        merge_coordinates(subject.strategy(), {"module": coordinates})
        unchanged = [torch.equal(a, b) for a, b in zip(before, snapshot(coordinates), strict=True)]
        assert all(unchanged), "merge modified its inputs; work on copies (blocks may be views of what others read)"

    def test_inputs_need_not_be_contiguous(self, subject: Subject) -> None:
        updates = random_updates(7, 9, subject.counted((2, 3)), dtype=torch.float64)
        found = subject.merged(views(updates))
        assert_close(found, subject.merged(updates), self.tolerance, "inputs that are not contiguous")

    def test_one_input_comes_back_where_that_is_promised(self, subject: Subject) -> None:
        for given in settings(self.preset().strategy.Params):
            if subject.strategy(**given).returns_single_input():
                for rank in (1, 3, 12):
                    update = random_update(7, 9, rank, scaling=2.0, dtype=torch.float64)
                    found = subject.merged([update], **given)
                    assert_close(found, densify(update), self.tolerance, f"one input of rank {rank} with {given}")

    def test_permuted_inputs_give_the_same_where_that_is_promised(self, subject: Subject) -> None:
        updates = random_updates(
            7, 9, subject.counted((2, 3, 1)), 2, scalings=subject.counted((1.0, 0.5, 2.0)), dtype=torch.float64
        )
        labels = [f"adapter {t}" for t in range(len(updates))]  # random numbers belong to them
        order = [*range(1, len(updates)), 0]
        found = subject.merged(updates, labels=tuple(labels))
        turned = subject.merged([updates[i] for i in order], labels=tuple(labels[i] for i in order))
        if self.preset().strategy.is_order_free:
            assert_close(turned, found, self.tolerance, "permuted inputs (is_order_free says they give the same)")

    def test_the_same_inputs_give_the_same_bits_whatever_else_is_merged(self, subject: Subject) -> None:
        modules = {str(i): random_updates(7 + i, 9, subject.counted((2, 3)), i) for i in range(4)}
        strategy, space = subject.strategy(), subject.space()
        weights = (1.0,) * len(modules["0"])
        first = merge_modules(strategy, space, modules, weights)
        others = {
            "a second merge": merge_modules(strategy, space, modules, weights),
            "another order of the modules": merge_modules(strategy, space, dict(reversed(modules.items())), weights),
        }
        if strategy.survey() is None:
            others["a module alone"] = {"0": merge_updates(strategy, space, modules["0"], module="0")}
        for what, found in others.items():
            same = [torch.equal(densify(first[name]), densify(update)) for name, update in found.items()]
            assert all(same), f"{what} gave other bits; keep no state between calls"

    def test_several_threads_give_the_same_bits(self, subject: Subject) -> None:
        modules = [random_updates(7 + i, 9, subject.counted((2, 3)), i) for i in range(8)]
        strategy, space = subject.strategy(), subject.space()

        def merged(updates: Sequence[LowRankUpdate]) -> Tensor:
            return densify(merge_updates(strategy, space, updates))

        alone = [merged(updates) for updates in modules]
        together = from_threads([lambda own=updates: merged(own) for updates in modules])  # type: ignore[misc]
        same = [torch.equal(a, b) for a, b in zip(alone, together, strict=True)]
        assert all(same), "one instance gave other bits in several threads; keep no state between calls"

    def test_random_numbers_depend_on_the_seed_and_the_module_and_nothing_else(self, subject: Subject) -> None:
        updates = random_updates(17, 19, subject.counted((2, 3)))
        results = {
            facts: subject.merged(updates, seed=facts[0], module=facts[1]) for facts in ((0, "a"), (1, "a"), (0, "b"))
        }
        drawn = [not torch.equal(result, results[0, "a"]) for result in results.values()][1:]
        if self.preset().strategy.is_random:
            assert all(drawn), "is_random, but another seed or module changes nothing; give `parameters` that draw"
        else:
            assert not any(drawn), "the seed or the module's name changes the result; set is_random = True"

    def test_global_random_numbers_are_neither_used_nor_drawn(self, subject: Subject) -> None:
        updates = random_updates(17, 19, subject.counted((2, 3)))
        results = []
        for seed in (1, 2):
            with _global_seed(seed):
                before = _global_state()
                results.append(subject.merged(updates))
                assert _global_state() == before, "a global generator was drawn from; use context.generator(position)"
        assert torch.equal(*results), "a global seed changes the result; draw from context.generator(position) only"

    def test_zero_inputs_merge_to_zero(self, subject: Subject) -> None:
        for zero in ("a", "b", "both"):
            silent = [_silenced(u, zero) for u in random_updates(7, 9, subject.counted((2, 3)))]
            for updates in _ways(subject, silent):
                found = subject.merged(updates)
                assert torch.equal(found, torch.zeros(7, 9)), (
                    f"inputs with {zero} zero gave {float(found.abs().max()):g}"
                )

    def test_a_zero_input_among_others_gives_finite_values(self, subject: Subject) -> None:
        for zero in ("a", "b", "both"):
            first, second, *others = random_updates(7, 9, subject.counted((2, 3, 2)))
            for updates in _ways(subject, [first, _silenced(second, zero), *others]):
                assert_sound(subject.update(updates), first)

    def test_an_adapter_given_twice_gives_finite_values(self, subject: Subject) -> None:
        update = random_update(7, 9, 3)
        for updates in _ways(subject, subject.counted((update,) * 3)):
            assert_sound(subject.update(updates), update)

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    def test_weights_are_refused_or_give_finite_values(self, subject: Subject, weights: tuple[float, ...]) -> None:
        own, strategy = subject.counted(weights), subject.strategy()
        try:
            strategy.check_weights(own, sum(own))
        except StrategyError as error:
            assert str(error).strip(), "check_weights refuses weights without a reason"  # noqa: PT017
            return
        updates = random_updates(7, 9, subject.counted((2, 3, 1)))
        assert_sound(subject.update(updates, own), updates[0])
        target = strategy.target_weights(own, sum(own))
        assert len(target) == len(own), f"target_weights gave {len(target)} numbers for {len(own)} inputs"
        assert all(map(math.isfinite, target)), f"target_weights of {own} are {target}"

    def test_tiny_and_huge_inputs_give_finite_values(self, subject: Subject) -> None:
        for factor in (1e-12, 1e12):
            scaled = [u.scaled(factor) for u in random_updates(7, 9, subject.counted((2, 3, 1)))]
            for updates in _ways(subject, scaled):
                assert_sound(subject.update(updates), updates[0])

    def test_a_module_that_some_inputs_lack_gives_finite_values(self, subject: Subject) -> None:
        for taking_part in ((1,), (0, 2)):
            own = taking_part[: self.preset().strategy.max_inputs]
            updates = random_updates(7, 9, (2, 3)[: len(own)])
            assert_sound(subject.update(updates, participants=own, total_weight=3.0), updates[0])

    def test_dense_inputs_give_what_their_factors_give(self, subject: Subject) -> None:
        # Not of rank one: in ``joint`` its directions are equal, but for rounding, and thresholds choose between them.
        low = random_updates(7, 9, subject.counted((2, 3, 2)), 3, dtype=torch.float64)
        for given in settings(self.preset().strategy.Params):
            expected = subject.merged(low, **given)
            for updates in _ways(subject, low):
                found = subject.merged(updates, **given)
                if _draws_alike(subject, updates, low):
                    assert_close(found, expected, self.tolerance, f"dense inputs with {given}")

    def test_dense_inputs_are_not_merged_where_the_method_says_that_it_takes_none(self, subject: Subject) -> None:
        if subject.space_kind.takes_dense and not self.preset().strategy.takes_dense:
            # Without ``low_rank`` it is the missing factors that stop it.
            with pytest.raises((StrategyError, AttributeError)):
                subject.update(streamed(random_updates(7, 9, subject.counted((2, 3)))))

    def test_float32_agrees_with_float64(self, subject: Subject) -> None:
        single = random_updates(13, 11, subject.counted((2, 3)), 4, scalings=subject.counted((2.0, 0.5)))
        double = [u.to("cpu", torch.float64) for u in single]
        if not self.preset().strategy.is_random:  # draws may differ between types
            assert_close(subject.merged(single).double(), subject.merged(double), 1e-3, "float32 against float64")

    def test_every_choice_and_bound_of_a_parameter_gives_finite_values(self, subject: Subject) -> None:
        updates = random_updates(7, 9, subject.counted((2, 3, 1)))
        for given in settings(self.preset().strategy.Params):
            assert_sound(subject.update(updates, **given), updates[0])

    def test_a_parameter_given_for_every_model_is_one_given_for_the_merge(self, subject: Subject) -> None:
        updates = random_updates(7, 9, subject.counted((2, 3, 1)))
        for given in settings(self.preset().strategy.Params):
            if given and set(given) <= self.preset().strategy.Params.per_input_names():
                shared, own = (
                    subject.merged(updates, **given),
                    subject.merged(updates, input_params=(given,) * len(updates)),
                )
                assert torch.equal(shared, own), f"{given} for each model gave other values; use context.each"

    def test_memory_estimates_grow_with_the_module(self, subject: Subject) -> None:
        strategy, space = subject.strategy(), subject.space()
        found = [strategy.working_entries(shape, space) for shape in GROWING]
        assert found[0] > 0
        assert found == sorted(found), f"working_entries falls while the module grows: {found}"
        in_scratch = [strategy.scratch_entries(shape, space) for shape in GROWING]
        assert all(0 <= part <= all_ for part, all_ in zip(in_scratch, found, strict=True)), (
            f"scratch_entries are {in_scratch}, of working_entries {found}"
        )

    @pytest.mark.parametrize("shape", MEASURED.values(), ids=MEASURED)
    def test_memory_stays_below_the_estimate(self, subject: Subject, shape: ModuleShape, tmp_path: Path) -> None:
        if shape.dense and not subject.takes_dense():
            return
        updates = _inputs(subject, shape)
        strategy, space = subject.strategy(), subject.space()
        working = strategy.working_entries(shape_of(updates), space)
        in_scratch = strategy.scratch_entries(shape_of(updates), space)
        merge_updates(strategy, space, random_updates(7, 9, subject.counted((2, 3))))  # imports and caches
        _assert_held(lambda: merge_updates(strategy, space, updates), working, f"merging {shape}")
        if in_scratch:
            with scratch_space(tmp_path, 0):
                rest = working - in_scratch
                _assert_held(lambda: merge_updates(strategy, space, updates), rest, f"merging {shape} in scratch space")

    def test_the_stand_in_is_a_method_that_takes_dense_inputs_in_delta(self) -> None:
        stand_in = self.preset().strategy.stand_in
        if stand_in is not None:
            name, parameters = stand_in
            preset = self.registry().method(name)
            assert preset.takes_dense, f"the stand-in '{name}' takes no dense inputs"
            assert "delta" in self.registry().spaces_of(preset), f"the stand-in '{name}' does not work in delta"
            preset.strategy.Params(**{**preset.parameters, **parameters})

    def test_parameters_are_described_and_strict(self) -> None:
        assert_parameters_are_described(self.preset().strategy.Params)

    def test_the_method_is_documented(self) -> None:
        preset = self.preset()
        assert_documented(preset, preset.strategy)
        assert isinstance(preset.paper, str)

    @pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
    def test_adapters_merge_with_nothing_but_defaults(
        self, subject: Subject, adapters: Sequence[Mapping[str, Any]], tmp_path: Path
    ) -> None:
        options = subject.counted(adapters)
        recipe = _recipe(subject, options, tmp_path)
        if subject.space_kind.name == self.registry().spaces_of(subject.preset)[0]:
            merge(recipe, tmp_path / "merged", registry=self.registry())
            written = PeftFormat().open(tmp_path / "merged", label="merged")
        else:
            space = {"space": subject.space_kind.name}
            written = merge(recipe | space, registry=self.registry(), executor="serial").open(label="merged")
        assert {name: (h.d_out, h.d_in) for name, h in written.modules.items()} == MODULES
        for name, header in written.modules.items():
            assert header.dtype == options[0].get("dtype", torch.float32)
            written.read(name)  # raises where a value is not finite

    def test_artefacts_are_finite_and_the_same_each_time(self, subject: Subject, tmp_path: Path) -> None:
        if self.preset().strategy.has_artefacts():
            recipe = _recipe(subject, subject.counted(ADAPTERS["mixed ranks"]), tmp_path)
            found, again = (merge(recipe, registry=self.registry()).artefacts for _ in range(2))
            assert found, "has_artefacts, but there are none"
            for name, tensor in found.items():
                assert bool(tensor.isfinite().all()), f"artefact '{name}' holds values that are not finite"
                assert torch.equal(tensor, again[name]), f"artefact '{name}' differs from one time to the next"


def _recipe(subject: Subject, options: Sequence[Mapping[str, Any]], directory: Path) -> dict[str, Any]:
    """A recipe over tiny adapters, with no more than the method."""
    paths = [
        write_tiny_adapter(directory / str(seed), **{"modules": MODULES, "seed": seed, **own})
        for seed, own in enumerate(options)
    ]
    return {"merge_method": subject.preset.name, "models": [{"model": str(path)} for path in paths]}


def _ways(subject: Subject, updates: Sequence[LowRankUpdate]) -> Iterator[Sequence[InputUpdate]]:
    """The updates as they are; where dense ones are taken, also all of them dense, and the first or all others."""
    yield updates
    if subject.takes_dense():
        dense = streamed(updates)
        yield dense
        if len(updates) > 1:
            yield [*dense[:1], *updates[1:]]
            yield [*updates[:1], *dense[1:]]


def _draws_alike(subject: Subject, *ways: Sequence[InputUpdate]) -> bool:
    """Whether random numbers, if there are any, fall on the same entries: blocks are cut along one axis."""
    axes = {tuple(part.axis for part in subject.space().encode(way, (1.0,) * len(way)).parts) for way in ways}
    return not subject.preset.strategy.is_random or len(axes) == 1


def _inputs(subject: Subject, shape: ModuleShape) -> Sequence[InputUpdate]:
    """Updates of this shape, as many as the method takes; the first ones dense and of full rank."""

    def made(t: int, rank: int) -> InputUpdate:
        if t >= shape.dense:
            return random_update(shape.d_out, shape.d_in, rank, t)
        return StreamedUpdate.of(torch.randn(shape.d_out, shape.d_in, generator=torch.Generator().manual_seed(t)))

    return [made(t, rank) for t, rank in enumerate(subject.counted(shape.ranks))]


def _assert_held(work: Callable[[], object], entries: int, what: str) -> None:
    peak, estimate = held(work).peak_bytes, entries * torch.float32.itemsize
    assert peak <= estimate + MEMORY_SLACK_BYTES, (
        f"{what} held {peak / 2**20:.1f} MiB; working_entries (less scratch_entries, there) says "
        f"{estimate / 2**20:.1f} MiB at most"
    )


def _silenced(update: LowRankUpdate, zero: str) -> LowRankUpdate:
    return LowRankUpdate(update.b * (zero == "a"), update.a * (zero == "b"), update.scaling)


def _global_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 - to see whether a strategy uses it
    return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(part).tolist() for part in numpy_state]


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
