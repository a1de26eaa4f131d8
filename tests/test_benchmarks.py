"""The benchmark suite: its arithmetic, and that both contenders of a job compute the same thing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank import merge
from tests.benchmarks import __main__ as command
from tests.benchmarks import growth, jobs, limits, measuring, ours, peers, shapes, startup, tables
from tests.benchmarks.costs import Costs, full_svd_flops, thin_svd_flops

TINY = shapes.Model("tiny", 2, {"self_attn.q_proj": (24, 20), "mlp.up_proj": (20, 28)})
RANK = 4


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three float32 adapters of ``TINY``."""
    return shapes.write_set(tmp_path / "in", TINY, inputs=3, rank=RANK, dtype=torch.float32)


def run_ours(label: str, paths: Sequence[str], out: Path, rank: int = RANK) -> list[Tensor]:
    """The deltas of a merge by this package."""
    merge(ours.METHODS[label].recipe(paths, rank), out)
    return deltas(out)


def run_peft(kind: str, paths: Sequence[str], out: Path, **options: Any) -> list[Tensor]:
    """Those of peft's."""
    peers.peft_merge(peers.skeleton(TINY), kind, paths, str(out), options)
    return deltas(out / "merged")


def deltas(out: Path) -> list[Tensor]:
    return [peers.deltas([str(out)], module)[0] for module in TINY.modules]


def test_the_models_have_the_modules_they_are_named_after() -> None:
    assert len(shapes.LLAVA_7B.modules) == len(shapes.LLAMA_8B.modules) == 224
    assert shapes.LLAVA_7B.counts == {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
    assert shapes.LLAMA_8B.counts == {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}


def test_adapters_of_a_seed_are_the_same_bytes_and_those_of_another_are_not(tmp_path: Path) -> None:
    first, second = (
        [
            Path(path, "adapter_model.safetensors").read_bytes()
            for path in shapes.write_set(root, TINY, inputs=2, rank=2)
        ]
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second
    assert first[0] != first[1]


def test_an_adapter_that_exists_is_kept(tmp_path: Path) -> None:
    (path,) = shapes.write_set(tmp_path, TINY, inputs=1, rank=2)
    before = Path(path, "adapter_model.safetensors").stat().st_mtime_ns
    assert shapes.write_set(tmp_path, TINY, inputs=1, rank=2) == [path]
    assert Path(path, "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_spread_is_the_median_the_least_and_the_greatest() -> None:
    assert measuring.spread([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0, "runs": 3}


def test_the_exponent_of_a_power_is_found() -> None:
    values = [2, 4, 8, 64]
    assert growth.exponent(values, [0.3 * x**1.7 for x in values]) == pytest.approx(1.7)


def test_the_exponent_leaves_out_what_the_start_up_swallowed() -> None:
    assert growth.exponent([1, 2, 4], [-0.001, 2.0, 4.0]) == pytest.approx(1)
    assert math.isnan(growth.exponent([1, 2], [-0.001, 2.0]))


def test_a_curve_subtracts_the_start_up_and_takes_medians() -> None:
    points = [
        {
            "value": value,
            "runs": [{"wall_seconds": 1.0 + s, "peak_bytes": 100 * value} for s in (value, value + 9, 0.0)],
        }
        for value in (1, 2, 4)
    ]
    found = growth.curve("modules", "linear", points, 1.0)
    assert found["seconds"] == [1, 2, 4]
    assert found["peak_bytes"] == [100, 200, 400]
    assert found["exponent"] == found["last_step"] == pytest.approx(1)


def test_contenders_take_turns_and_a_slow_one_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def run(function: Callable[..., Any], *arguments: Any) -> measuring.Figures:
        order.append(arguments[0])
        return {"wall_seconds": 2.0 if arguments[0] == "slow" else 0.5}

    monkeypatch.setattr(measuring, "isolated", run)
    names = ("a", "slow", "b")
    found = measuring.in_turn([measuring.Contender(n, print, (n,)) for n in names], 3, patience=1.0)
    assert order == ["a", "slow", "b", "a", "b", "a", "b"]
    assert [len(runs) for runs in found.values()] == [3, 1, 3]


def test_a_call_runs_in_a_process_of_its_own() -> None:
    assert measuring.isolated(measuring.spread, [1.0, 2.0])["median"] == 1.5


def test_what_fails_in_another_process_ends_the_run_with_its_traceback() -> None:
    with pytest.raises(SystemExit, match=r"(?s)spread: Traceback .*StatisticsError"):
        measuring.isolated(measuring.spread, [])


@pytest.mark.skipif(measuring.anonymous_bytes() is None, reason="this system does not say")
def test_the_peak_is_what_a_call_held_at_most() -> None:
    def work() -> None:
        held = torch.ones(256 << 20, dtype=torch.uint8)
        time.sleep(20 * measuring.SAMPLE_SECONDS)
        del held

    assert (256 << 20) * 0.9 < measuring.measured(work)["peak_bytes"] < (256 << 20) * 2


def test_memory_is_not_measured_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "STATUS", Path("no such file"))
    assert measuring.measured(lambda: None)["peak_bytes"] is None
    assert tables.mebibytes(None) == ""


def test_a_dense_cost_is_carried_over_by_operation_counts() -> None:
    tall, wide = {"wall_seconds": 10.0, "cpu_seconds": 20.0}, {"wall_seconds": 30.0, "cpu_seconds": 50.0}
    costs = Costs(thin_svd_flops, {(80, 40): tall, (40, 80): wide})
    assert costs.of((80, 40)) == 10
    assert costs.of((160, 40)) == pytest.approx(10 * thin_svd_flops((160, 40)) / thin_svd_flops((80, 40)))
    assert costs.total({(80, 40): 2, (40, 80): 1}) == 50
    assert Costs(thin_svd_flops, {(80, 40): tall}).of((40, 80), "cpu_seconds") == 20  # as its transpose


def test_full_matrices_count_the_square_of_the_long_side() -> None:
    assert full_svd_flops((100, 10)) == full_svd_flops((10, 100)) == 4 * 100**2 * 10 + 22 * 10**3


def test_the_least_work_of_a_sum_of_factors_is_two_operations_an_entry() -> None:
    entries = 2 * 3 * RANK * (24 + 20 + 20 + 28)  # layers, inputs
    assert limits.least_flops("linear in factors", TINY, 3, RANK) == 2 * entries


@pytest.mark.parametrize("label", ours.METHODS)
def test_the_least_work_grows_with_layers_and_inputs(label: str) -> None:
    flops = limits.least_flops(label, TINY, 3, RANK)
    assert limits.least_flops(label, TINY.with_layers(6), 3, RANK) == pytest.approx(3 * flops)
    assert limits.least_flops(label, TINY, 6, RANK) > 1.5 * flops


def test_the_limit_adds_the_arithmetic_at_the_measured_rate() -> None:
    assert limits.limit_seconds({"wall_seconds": 2.0, "gemm_flops_per_second": 10.0}, 5.0) == 2.5


def test_the_limit_has_its_components_and_leaves_no_file(paths: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = limits.measured_limit(paths, str(out), (1 << 20) + 5)
    assert list(found["parts"]) == ["read_and_touch", "hash", "write"]
    assert found["wall_seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["bytes_read"] == sum(Path(path, "adapter_model.safetensors").stat().st_size for path in paths)
    assert found["gemm_flops_per_second"] > 0
    assert not out.exists()


def test_a_merge_is_measured_with_its_bytes_and_deleted(paths: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = ours.merged(ours.METHODS["linear"].recipe(paths, RANK), str(out))
    assert found["bytes_read"] > 0
    assert found["bytes_written"] > 0
    assert not out.exists()


def test_a_warm_merge_reports_the_energy_it_kept(tmp_path: Path) -> None:
    paths = shapes.write_set(tmp_path / "in", shapes.one_module((20, 24)), inputs=2, rank=RANK)
    found = ours.merged_warm(ours.METHODS["linear"].recipe(paths, RANK), str(tmp_path / "out"), 1)
    assert 0.5 < found["kept_energy"] < 1


@pytest.mark.parametrize("label", ours.METHODS)
def test_every_method_merges(label: str, paths: list[str], tmp_path: Path) -> None:
    if not ours.installed(ours.METHODS[label]):
        pytest.skip("a plugin's")
    assert all(float(delta.norm()) > 0 for delta in run_ours(label, paths, tmp_path / "out"))


def test_the_transcription_of_robustmerge_gives_what_ours_gives(paths: list[str], tmp_path: Path) -> None:
    peers.robustmerge_loop(paths, str(tmp_path / "theirs"))
    for mine, theirs in zip(run_ours("robustmerge", paths, tmp_path / "out"), deltas(tmp_path / "theirs"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_peft_svd_gives_what_our_sum_at_the_same_rank_gives(full: bool, paths: list[str], tmp_path: Path) -> None:
    theirs = run_peft("svd", paths, tmp_path / "peft", svd_rank=RANK, svd_full_matrices=full)
    for mine, other in zip(run_ours("linear", paths, tmp_path / "out"), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("label", "kind"), [("linear in factors", "linear"), ("ties in factors", "ties"), ("ties", "ties_svd")]
)
def test_peft_gives_what_ours_gives(label: str, kind: str, paths: list[str], tmp_path: Path) -> None:
    options = {"svd_rank": RANK} if "svd" in kind else {}
    theirs = run_peft(kind, paths, tmp_path / "peft", **options)
    for mine, other in zip(run_ours(label, paths, tmp_path / "out"), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_dense_ties_gives_what_ours_gives_at_full_rank(paths: list[str], tmp_path: Path) -> None:
    found = run_ours("ties", paths, tmp_path / "out", rank=20)
    for mine, module in zip(found, TINY.modules, strict=True):
        torch.testing.assert_close(mine, peers.dense_ties(peers.deltas(paths, module)), rtol=1e-3, atol=1e-5)


def test_the_captured_energy_is_that_of_the_exact_truncation(tmp_path: Path) -> None:
    paths = shapes.write_set(tmp_path / "in", shapes.one_module((40, 60)), inputs=3, rank=RANK, dtype=torch.float32)
    found = peers.energies(ours.METHODS["ties"].recipe(paths, RANK), str(tmp_path / "out"))
    assert 0.1 < found["captured_energy"] < 0.9
    assert found["captured_energy"] == pytest.approx(found["exact_energy"], rel=1e-5)


def test_the_captured_energy_of_another_result_falls_short(tmp_path: Path) -> None:
    paths = shapes.write_set(tmp_path / "in", shapes.one_module((40, 60)), inputs=3, rank=RANK, dtype=torch.float32)
    recipe = ours.METHODS["linear"].recipe(paths, RANK)
    assert peers.energies(recipe, str(tmp_path / "out"))["shortfall"] > 0.1


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "dare_ties_svd"])
def test_peft_merges_a_module_of_its_own(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "scratch"
    found = peers.run_peft_module(kind, (24, 20), 3, RANK, {"svd_full_matrices": False}, str(directory))
    assert found["wall_seconds"] > 0
    assert not directory.exists()


def test_help_imports_nothing_heavy() -> None:
    assert "torch" not in startup.heavy_modules()


def test_a_summary_subtracts_the_start_up_from_the_seconds_alone() -> None:
    runs = [{"wall_seconds": w, "cpu_seconds": 2 * w, "peak_bytes": 7} for w in (3.0, 2.0, 4.0)]
    found = jobs.summary("linear", runs, who="ours", startup=0.5)
    assert found["seconds"] == {"median": 2.5, "min": 1.5, "max": 3.5, "runs": 3}
    assert found["utilisation"] == 2
    assert found["cpu_seconds"] == 6


def test_the_share_of_the_limit_is_the_limit_over_our_seconds() -> None:
    row = {"seconds": {"median": 4.0}}
    jobs.add_limit(row, [{"wall_seconds": 1.0, "gemm_flops_per_second": 10.0}], 10.0)
    assert row["limit_seconds"] == 2
    assert row["limit_share"] == 0.5


def test_a_concatenation_is_counted_tall() -> None:
    assert jobs.concatenation("drm horizontal", 8)((11008, 4096)) == (32768, 11008)
    assert jobs.concatenation("drm vertical", 8)((11008, 4096)) == (88064, 4096)


def test_a_row_shows_median_span_ratio_and_memory() -> None:
    row = {
        "model": "tiny",
        "name": "loop",
        "who": "peer",
        "seconds": {"median": 1234.5, "min": 0.01234, "max": 2000.0, "runs": 3},
        "ratio": 2.345,
        "cpu_seconds": 3.0,
        "utilisation": 1.504,
        "peak_bytes": 20 << 20,
        "bytes_read": 1 << 20,
        "bytes_written": None,
    }
    text = tables.whole_table([row]).splitlines()[2]
    assert text == "| tiny | loop | 1,234 (0.0123\u20132,000) | 2.35 | 3 | 150 % | 20 MiB | 1.0 MiB |  |  |"


def test_targets_say_what_was_found_and_whether_it_is_enough() -> None:
    job = jobs.Job("S0", 0.0)
    job.target("at most two", 1.5, "×", 2)
    job.target("at least two", 1.5, "×", 2, at_least=True)
    assert [target["met"] for target in job.targets] == [True, False]
    assert "| at least two | 1.5 × | **no** |" in tables.target_table(job.targets)


def job_of(seconds: float, *, quick: bool = False) -> dict[str, Any]:
    row = {"who": "ours", "model": "llava-7b", "seconds": {"median": seconds}, "peak_bytes": 2 << 30}
    return {"rows": [row], "targets": [], "environment": {"settings": {"quick": quick}}}


def test_jobs_are_held_against_each_other() -> None:
    targets = command.all_targets({"S1": job_of(2.0), "S3": job_of(10.0), "S2": job_of(26.0)})
    assert [(t["target"], t["found"], t["met"]) for t in targets] == [
        ("S2 within 12 × S1", "13 ×", False),
        ("S3 within 6 × S1", "5 ×", True),
        ("memory below 1 GiB", "2,048 MiB", False),
    ]


def test_jobs_that_were_not_run_have_no_targets() -> None:
    assert [t["target"] for t in command.all_targets({"S3": job_of(1.0)})] == ["memory below 1 GiB"]


def test_narrowed_models_have_no_targets() -> None:
    assert command.all_targets({"S1": job_of(1.0, quick=True)}) == []


@pytest.mark.slow
@pytest.mark.skipif("RUN_BENCHMARKS" not in os.environ, reason="takes minutes; set RUN_BENCHMARKS to run it")
def test_every_job_runs_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    for module in (measuring, jobs, growth):
        monkeypatch.setattr(module, "isolated", here)
    points = [growth.Point(2 * n, shapes.square(16, layers=n, modules=2), rank=2) for n in (1, 2)]
    monkeypatch.setattr(growth, "axes", lambda quick: {"modules": points, "inputs": points})
    monkeypatch.setattr(growth, "METHODS", {"linear": 2.2, "robustmerge": 1.1})
    monkeypatch.setattr(startup, "LEAST_RUNS", 1)
    monkeypatch.setattr(jobs, "QUICK_DIVISOR", 64)
    command.main([str(tmp_path), "--quick", "--layers", "1", "--inputs", "2"])
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(found["jobs"]) == list(command.JOBS)
    assert all(job["rows"] or job["curves"] for job in found["jobs"].values())
    page = (tmp_path / "benchmarks.md").read_text()
    assert all(job["title"] in page for job in found["jobs"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "benchmarks.json", "benchmarks.md"]
