"""What each rank policy writes, read back from the file and held against dense deltas."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lowrank import Adapter, RecipeError, Reporter, SurveyRound, merge
from mergekit_lowrank.engine.records import ARBITRARY_CUT
from mergekit_lowrank.formats import tensor_names
from mergekit_lowrank.lowrank import krylov, truncation
from mergekit_lowrank.recipe import load_recipe
from mergekit_lowrank.report import closing_lines
from mergekit_lowrank.testing import random_update, write_tiny_adapter
from tests.end_to_end.makers import MODULES, adapters, stored_config, stored_factors

BYTES = {name: 4 * (d_out + d_in) for name, (d_out, d_in) in MODULES.items()}
"""Of one direction in float32."""


def recipe_of(paths, method="task_arithmetic", **keys):
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


def budget(size, **keys):
    return {"rank": {"budget": size}, "uniform_rank": False, **keys}


def summed(paths):
    """Σ ΔW of adapters with rank 3 and alpha 0.6, as dense deltas."""
    factors = {name: [stored_factors(path, name) for path in paths] for name in MODULES}
    return {name: sum(0.2 * b.double() @ a.double() for b, a in pairs) for name, pairs in factors.items()}


def written(path):
    """(B, A) by module."""
    return {name: stored_factors(path, name) for name in MODULES}


def product(factors):
    b, a = factors
    return b.double() @ a.double()


def ranks_in(path):
    return {name: a.shape[0] for name, (_, a) in written(path).items()}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def best_error(delta, rank):
    values = torch.linalg.svdvals(delta)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("bound", [0.7, 0.3, 0.05])
def test_an_error_is_kept_by_the_least_rank_in_every_module(tmp_path, bound) -> None:
    paths = adapters(tmp_path)
    report = merge(recipe_of(paths, output={"rank": {"error": bound}, "uniform_rank": False}), tmp_path / "out")
    for name, delta in summed(paths).items():
        rank = ranks_in(tmp_path / "out")[name]
        assert relative(product(written(tmp_path / "out")[name]), delta) <= bound + 1e-6
        assert best_error(delta, rank - 1) > bound
    for module in report.modules:
        assert module["cut_error"] <= bound
        assert module["cut_error"] == pytest.approx(
            best_error(summed(paths)[module["module"]], module["rank"]), rel=1e-4
        )
    assert report.totals.largest_cut_error == max(module["cut_error"] for module in report.modules)


@pytest.mark.parametrize("rank", ["sum", 9, 10, 33, 10_000, {"energy": 1.0}, {"error": 1e-8}, {"error": 1e-300}])
@pytest.mark.parametrize("uniform", [True, False])
def test_more_than_there_is_gives_all_there_is(tmp_path, rank, uniform) -> None:
    paths = adapters(tmp_path)  # three of rank 3: a joint rank of 9, in modules of 32 and 48
    report = merge(recipe_of(paths, output={"rank": rank, "uniform_rank": uniform}), tmp_path / "out")
    for name, delta in summed(paths).items():
        assert relative(product(written(tmp_path / "out")[name]), delta) < 1e-6
    assert (report.totals.kept_energy, report.totals.largest_cut_error) == (1.0, 0.0)
    assert {module["rank"] for module in report.modules} == {9}


@pytest.mark.parametrize("rank", ["sum", 5, {"energy": 1.0}, {"error": 1e-6}, {"budget": "1MB"}])
def test_a_joint_rank_above_both_sides_is_cut_to_the_smaller(tmp_path, rank) -> None:
    modules = {"layers.0.q": (4, 6), "layers.0.k": (5, 4)}
    paths = [write_tiny_adapter(tmp_path / str(seed), modules, rank=3, lora_alpha=3, seed=seed) for seed in (1, 2)]
    report = merge(recipe_of(paths, output={"rank": rank, "uniform_rank": False}), tmp_path / "out")
    assert [module["rank"] for module in report.modules] == [4, 4]
    for name in modules:
        delta = sum(product(stored_factors(path, name)) for path in paths)
        assert relative(product(stored_factors(tmp_path / "out", name)), delta) < 1e-6


def test_opposed_adapters_leave_one_direction_under_every_policy(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    models = [{"model": str(path), "parameters": {"weight": weight}} for weight in (1.0, -1.0)]
    for number, rank in enumerate(({"energy": 0.9}, {"error": 0.1}, {"budget": "1MB"})):
        recipe = {"merge_method": "task_arithmetic", "models": models, "output": {"rank": rank, "uniform_rank": False}}
        merge(recipe, tmp_path / str(number))
        for factors in written(tmp_path / str(number)).values():
            assert float(product(factors).abs().max()) < 1e-6


class TestBudget:
    def bought(self, deltas, size, sizes, least):
        """Ranks by a plain search over all directions of all modules, best ratio first."""
        values = {name: torch.linalg.svdvals(delta)[:9].square().tolist() for name, delta in deltas.items()}
        ranks = dict.fromkeys(deltas, least)
        left = size - sum(least * sizes[name] for name in deltas)
        order = sorted((-value / sizes[name], name, i) for name, own in values.items() for i, value in enumerate(own))
        closed = set()
        for _, name, index in order:
            if index < ranks[name] or name in closed:
                continue
            if sizes[name] > left:
                closed.add(name)
                continue
            ranks[name], left = ranks[name] + 1, left - sizes[name]
        return ranks

    @pytest.mark.parametrize("size", [4_000, 9_001, 15_000])
    def test_what_is_written_is_the_best_that_the_bytes_can_hold(self, tmp_path, size) -> None:
        paths = adapters(tmp_path)
        report = merge(recipe_of(paths, output=budget(size)), tmp_path / "out")
        ranks, deltas = ranks_in(tmp_path / "out"), summed(paths)
        assert ranks == self.bought(deltas, size, BYTES, 1)
        assert len(set(ranks.values())) > 1
        for name, delta in deltas.items():
            assert relative(product(written(tmp_path / "out")[name]), delta) == pytest.approx(
                best_error(delta, ranks[name]), abs=1e-6
            )
        used = sum(rank * BYTES[name] for name, rank in ranks.items())
        assert (report.totals.bytes_written, report.totals.budget_bytes) == (used, size)
        assert size - min(BYTES.values()) < used <= size
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == used

    def test_the_configuration_names_every_rank(self, tmp_path) -> None:
        merge(recipe_of(adapters(tmp_path), output=budget("9kB")), tmp_path / "out")
        config, ranks = stored_config(tmp_path / "out"), ranks_in(tmp_path / "out")
        assert config["r"] == config["lora_alpha"] == max(ranks.values())
        assert len(config["rank_pattern"]) == sum(rank < config["r"] for rank in ranks.values())
        assert config["rank_pattern"] == config["alpha_pattern"]

    def test_more_than_everything_buys_everything(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        report = merge(recipe_of(paths, output=budget("1GB")), tmp_path / "out")
        assert set(ranks_in(tmp_path / "out").values()) == {9}
        assert report.totals.kept_energy == 1.0

    def test_the_least_budget_buys_one_direction_each(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        report = merge(recipe_of(paths, output=budget(sum(BYTES.values()))), tmp_path / "out")
        assert set(ranks_in(tmp_path / "out").values()) == {1}
        assert report.totals.bytes_written == report.totals.budget_bytes

    def test_half_the_bytes_a_number_buy_twice_the_directions(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths, output=budget(2 * sum(BYTES.values())), out_dtype="bfloat16"), tmp_path / "out")
        assert sum(rank * BYTES[name] for name, rank in ranks_in(tmp_path / "out").items()) > 3.5 * sum(BYTES.values())

    def test_rules_with_a_rank_are_paid_first(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        rules = [{"match": "output.dense", "rank": 2}]
        merge(recipe_of(paths, output=budget(9_001), rules=rules), tmp_path / "out")
        ranks = ranks_in(tmp_path / "out")
        fixed = [name for name in MODULES if "output.dense" in name]
        assert {ranks[name] for name in fixed} == {2}
        left = 9_001 - sum(2 * BYTES[name] for name in fixed)
        open_modules = {name: delta for name, delta in summed(paths).items() if name not in fixed}
        assert {name: ranks[name] for name in open_modules} == self.bought(open_modules, left, BYTES, 1)

    def test_directions_at_the_level_of_rounding_are_not_bought(self, tmp_path) -> None:
        (path,) = adapters(tmp_path, 1)
        merge(recipe_of([path] * 4, output=budget("1GB")), tmp_path / "out")
        assert set(ranks_in(tmp_path / "out").values()) == {3}

    def test_accepted_ranks_are_what_is_bought(self, tmp_path) -> None:
        merge(recipe_of(adapters(tmp_path), output=budget(9_001, snap=[1, 4, 8])), tmp_path / "out")
        ranks = ranks_in(tmp_path / "out")
        assert set(ranks.values()) <= {1, 4, 8}
        assert len(set(ranks.values())) > 1
        assert sum(rank * BYTES[name] for name, rank in ranks.items()) <= 9_001

    def test_the_scale_of_a_module_counts(self, tmp_path) -> None:
        rules = [{"match": "layer.0.", "scale": 100.0}]
        merge(recipe_of(adapters(tmp_path), output=budget(12_001), rules=rules), tmp_path / "out")
        ranks = ranks_in(tmp_path / "out")
        assert {rank for name, rank in ranks.items() if "layer.0." in name} == {9}

    @pytest.mark.parametrize("method", ["task_arithmetic", "ties", "knots"])
    def test_threads_and_order_do_not_change_what_is_bought(self, tmp_path, method) -> None:
        paths = adapters(tmp_path)
        files = []
        for executor in ("serial", "threads", "threads"):
            out = tmp_path / f"out{len(files)}"
            merge(recipe_of(paths, method, output=budget(9_001)), out, executor=executor)
            files.append((out / "adapter_model.safetensors").read_bytes())
        assert files[0] == files[1] == files[2]

    def test_the_written_recipe_buys_the_same(self, tmp_path) -> None:
        merge(recipe_of(adapters(tmp_path), output=budget("9kB")), tmp_path / "out")
        merge(load_recipe(tmp_path / "out" / "recipe.yaml"), tmp_path / "again")
        files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
        assert files[0] == files[1]

    def test_a_merge_in_memory_buys_the_same(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths, output=budget("9kB")), tmp_path / "out")
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        held = merge(recipe_of(paths, output=budget("9kB"))).state_dict
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[name], stored[name]) for name in stored)

    def test_nothing_waits_in_a_spool(self, tmp_path, monkeypatch) -> None:
        def spool(*_):
            raise AssertionError("a spool was opened")

        monkeypatch.setattr("mergekit_lowrank.engine.sinks.SpoolSink.__init__", spool)
        merge(recipe_of(adapters(tmp_path), output=budget("9kB")), tmp_path / "out")

    def test_the_closing_lines_say_what_was_used(self, tmp_path) -> None:
        report = merge(recipe_of(adapters(tmp_path), output=budget("9kB")), tmp_path / "out")
        text = "\n".join(closing_lines(report, "out"))
        assert "  budget       8.8 KiB of 8.8 KiB used" in text
        assert f"ranks {min(ranks_in(tmp_path / 'out').values())} to {report.rank}" in text
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"to {report.rank}, " in card
        assert "ranks differ between modules" in card
        assert "vllm serve" not in card
        assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["budget_bytes"] == 9_000

    def test_without_a_budget_nothing_is_said_of_one(self, tmp_path) -> None:
        report = merge(recipe_of(adapters(tmp_path)), tmp_path / "out")
        assert report.totals.budget_bytes is None
        assert "budget" not in "\n".join(closing_lines(report, "out"))


class Rounds(Reporter):
    name, summary = "rounds", "counts the modules of each round"

    def __init__(self):
        self.counts = {}

    def handle(self, event):
        if isinstance(event, SurveyRound):
            self.counts[event.round] = self.counts.get(event.round, 0) + 1


class TestRounds:
    def test_a_low_rank_result_is_measured_once(self, tmp_path) -> None:
        rounds = Rounds()
        merge(recipe_of(adapters(tmp_path), output=budget("9kB")), tmp_path / "out", reporters=[rounds])
        assert rounds.counts == {1: len(MODULES)}

    def test_the_budget_comes_after_the_rounds_of_methods(self, tmp_path) -> None:
        rounds = Rounds()
        merge(recipe_of(adapters(tmp_path), "knots", output=budget("9kB")), tmp_path / "out", reporters=[rounds])
        assert rounds.counts == dict.fromkeys((1, 2, 3, 4), len(MODULES))

    def test_rules_with_a_rank_are_not_measured(self, tmp_path) -> None:
        rounds = Rounds()
        recipe = recipe_of(adapters(tmp_path), output=budget("9kB"), rules=[{"match": "output.dense", "rank": 2}])
        merge(recipe, tmp_path / "out", reporters=[rounds])
        assert rounds.counts == {1: len(MODULES) - 2}

    def test_a_dense_result_is_decomposed_further_where_all_that_is_known_of_it_was_bought(
        self, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr(truncation, "EXACT_SIDE", 4)
        monkeypatch.setattr(krylov, "OVERSAMPLING", 2)
        modules = {"layers.0.q": (64, 60), "layers.1.q": (64, 60)}
        paths = [write_tiny_adapter(tmp_path / str(seed), modules, rank=2, seed=seed) for seed in (1, 2)]
        rules = [{"match": "layers.0", "scale": 0.01}]
        size = (1 + 12) * 4 * (64 + 60)  # one direction for the small module, the other twelve for the large one
        rounds = Rounds()
        recipe = recipe_of(paths, "ties", parameters={"density": 0.5}, rules=rules, output=budget(size))
        report = merge(recipe, tmp_path / "out", reporters=[rounds])
        assert [module["rank"] for module in report.modules] == [1, 12]
        assert rounds.counts == {1: 2, 2: 1}  # twelve directions of both, 24 of the large one

    def test_a_zero_result_is_not_decomposed_further(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(truncation, "EXACT_SIDE", 4)
        modules = {"layers.0.q": (64, 48), "layers.1.q": (64, 48)}
        paths = [write_tiny_adapter(tmp_path / str(seed), modules, rank=2, seed=seed) for seed in (1, 2)]
        recipe = recipe_of(paths, "ties", scale=0.0, output=budget("1MB"))
        report = merge(recipe, tmp_path / "out")
        assert [module["rank"] for module in report.modules] == [1, 1]


class TestSnap:
    def test_extra_directions_of_a_planned_rank_are_used(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths, output={"rank": 5, "snap": "vllm"}), tmp_path / "out")
        for name, delta in summed(paths).items():
            found = written(tmp_path / "out")[name]
            assert found[1].shape[0] == 8
            assert relative(product(found), delta) == pytest.approx(best_error(delta, 8), abs=1e-6)

    @pytest.mark.parametrize("uniform", [True, False])
    def test_a_rank_that_depends_on_the_data_is_raised_and_used(self, tmp_path, uniform) -> None:
        paths = adapters(tmp_path)
        output = {"rank": {"error": 0.5}, "snap": [1, 6, 8], "uniform_rank": uniform}
        report = merge(recipe_of(paths, output=output), tmp_path / "out")
        assert set(ranks_in(tmp_path / "out").values()) == {6}
        for name, delta in summed(paths).items():
            assert 1 < next(rank for rank in range(10) if best_error(delta, rank) <= 0.5) < 6
            assert relative(product(written(tmp_path / "out")[name]), delta) == pytest.approx(
                best_error(delta, 6), abs=1e-6
            )
        assert {module["rank"] for module in report.modules} == {6}

    def test_more_rows_than_directions_are_zeros(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths, output={"rank": "sum", "snap": "vllm"}), tmp_path / "out")
        for name, delta in summed(paths).items():
            b, a = written(tmp_path / "out")[name]
            assert a.shape[0] == 16
            assert torch.count_nonzero(a[9:]) == torch.count_nonzero(b[:, 9:]) == 0
            assert relative(product((b, a)), delta) < 1e-6
        config = stored_config(tmp_path / "out")
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})

    @pytest.mark.parametrize("uniform", [True, False])
    def test_a_rank_above_every_accepted_one_stops_the_merge_and_leaves_nothing(self, tmp_path, uniform) -> None:
        paths = adapters(tmp_path)
        output = {"rank": {"energy": 0.999}, "snap": [1, 4], "uniform_rank": uniform}
        with pytest.raises(
            RecipeError, match=r"output\.snap: module '.*' has rank 9, and the largest accepted"
        ) as caught:
            merge(recipe_of(paths, output=output), tmp_path / "out")
        assert "set output.rank to 4 or less, or leave snap out" in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


class TestBalance:
    @pytest.mark.parametrize("rank", ["max", "sum", {"energy": 0.9}])
    def test_both_factors_share_the_singular_values(self, tmp_path, rank) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths, output={"rank": rank}), tmp_path / "plain")
        merge(recipe_of(paths, output={"rank": rank, "balance": True}), tmp_path / "balanced")
        for name, factors in written(tmp_path / "plain").items():
            b, a = written(tmp_path / "balanced")[name]
            assert relative(product((b, a)), product(factors)) < 1e-6
            torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-5)
            diagonal = (a @ a.T).diagonal()
            torch.testing.assert_close(a @ a.T, diagonal.diag(), rtol=1e-4, atol=1e-5)
            assert bool((diagonal.diff() <= 1e-6).all())

    def test_one_adapter_that_would_come_back_untouched_is_balanced_too(self, tmp_path) -> None:
        (path,) = adapters(tmp_path, 1)
        report = merge(recipe_of([path], output={"balance": True}), tmp_path / "out")
        for name, delta in summed([path]).items():
            b, a = written(tmp_path / "out")[name]
            assert relative(product((b, a)), delta) < 1e-6
            torch.testing.assert_close(b.norm(), a.norm())
        assert {module["rank"] for module in report.modules} == {3}
        assert report.totals.kept_energy == 1.0


def in_memory(updates):
    """An adapter of one module for each update, all of one rank."""
    rank = updates[0].rank
    state = {}
    for index, update in enumerate(updates):
        a_name, b_name = tensor_names(f"layers.{index}.q")
        state |= {a_name: update.a, b_name: update.b}
    return Adapter(state, {"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2, "target_modules": ["q"]})


def regauged(updates, seed):
    """The same updates as (B·G, G⁻¹·A) with random G."""
    source = torch.Generator().manual_seed(seed)
    rank = updates[0].rank
    gauges = [torch.eye(rank).double() + 0.3 * torch.randn(rank, rank, generator=source).double() for _ in updates]
    pairs = zip(updates, gauges, strict=True)
    return [type(u)(u.b @ gauge, torch.linalg.solve(gauge, u.a)) for u, gauge in pairs]


def merged_deltas(inputs, method, **keys):
    models = [{"model": in_memory(updates), "parameters": {"weight": 0.7}} for updates in inputs]
    state = merge({"merge_method": method, "models": models, "output": {"rank": "sum"}, **keys}).state_dict
    names = [tensor_names(f"layers.{index}.q") for index in range(len(inputs[0]))]
    return torch.stack([state[b] @ state[a] for a, b in names])


SHARED = {"density": 0.5}
IN_FACTORS = {
    "robustmerge": ("robustmerge", {"parameters": SHARED}),
    "ties": ("ties", {"space": "factors", "parameters": SHARED}),
    "ties with one threshold": ("ties", {"space": "factors", "parameters": {**SHARED, "scope": "model"}}),
    "linear": ("linear", {"space": "factors"}),
}


class TestCanonical:
    @pytest.mark.parametrize("case", IN_FACTORS)
    @settings(deadline=None, max_examples=15)
    @given(rank=st.integers(2, 4), seed=st.integers(0, 10_000))
    def test_results_do_not_depend_on_how_the_inputs_were_factorised(self, case, rank, seed) -> None:
        method, keys = IN_FACTORS[case]
        first = [[random_update(9, 8, rank, seed + 7 * t + m, dtype=torch.float64) for m in (0, 1)] for t in (0, 1)]
        second = [regauged(updates, seed + t) for t, updates in enumerate(first)]
        expected = merged_deltas(first, method, canonical="svd", **keys)
        assert relative(merged_deltas(second, method, canonical="svd", **keys), expected) < 1e-6
        assert relative(merged_deltas(second, method, **keys), merged_deltas(first, method, **keys)) > 1e-3

    @pytest.mark.parametrize(("method", "keys"), [("linear", {}), ("drm", {}), ("knots", {}), ("ties", {})])
    def test_spaces_that_see_the_update_give_the_same_with_and_without(self, method, keys) -> None:
        inputs = [[random_update(9, 8, 3, 10 * t + m, dtype=torch.float64) for m in (0, 1)] for t in (0, 1)]
        expected = merged_deltas(inputs, method, **keys)
        assert relative(merged_deltas(inputs, method, canonical="svd", **keys), expected) < 1e-9

    def test_the_scaling_is_folded_in(self) -> None:
        updates = [random_update(9, 8, 3, 1, dtype=torch.float64)]
        (found,) = merged_deltas([updates], "linear", canonical="svd", space="factors")
        # peft's scaling is 1/2 here, and the weight of an average with itself alone is 1.
        assert relative(found, updates[0].b @ updates[0].a / 2) < 1e-12

    def test_a_rank_deficient_input_is_merged(self, tmp_path) -> None:
        (path,) = adapters(tmp_path, 1)
        tensors = load_file(path / "adapter_model.safetensors")
        for name in MODULES:
            a_name, _ = tensor_names(name)
            tensors[a_name][2] = tensors[a_name][1]
        save_file(tensors, path / "adapter_model.safetensors")
        report = merge(recipe_of([path, path], "robustmerge", canonical="svd"), tmp_path / "out")
        assert report.totals.merged_norm > 0
        assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


def with_values(path, values):
    """An adapter of one square module with these singular values."""

    source = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(12, len(values), generator=source)).Q for _ in range(2))
    write_tiny_adapter(path, {"layers.0.q": (12, 12)}, rank=len(values), lora_alpha=len(values))
    names = load_file(path / "adapter_model.safetensors")
    tensors = {
        name: (left * torch.tensor(values)).contiguous() if "lora_B" in name else right.T.contiguous() for name in names
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("rank", "is_told"), [(1, False), (2, True), (3, False), (4, False)], ids=["gap", "cut", "gap again", "all"]
)
def test_a_cut_between_equal_singular_values_is_a_warning(tmp_path, rank, is_told) -> None:
    path = with_values(tmp_path / "a", [3.0, 2.0, 2.0, 1.0])
    merged = merge(recipe_of([path], "linear", output={"rank": rank}, out_dtype="float32"))
    told = [warning for warning in merged.report.warnings if ARBITRARY_CUT in warning]
    assert bool(told) == is_told
    assert all("at rank 2: which directions are kept depends on rounding" in warning for warning in told)
