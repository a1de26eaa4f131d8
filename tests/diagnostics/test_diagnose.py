"""Whole diagnoses: of any executor the same bytes, in memory that does not grow, of inputs of every kind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import MemoryBudgetError, MergeError, Registry, plan
from mergekit_lowrank.diagnostics import Diagnosis, diagnose
from mergekit_lowrank.diagnostics.measures import ModuleMeasure, with_room
from mergekit_lowrank.engine.devices import CpuDevice
from mergekit_lowrank.engine.merging import Encodings, read_updates
from mergekit_lowrank.events import Event, Reporter, SurveyRound
from mergekit_lowrank.testing import write_tiny_adapter
from mergekit_lowrank.testing.memory import held
from tests.benchmarks.diagnosis import diagnosed

from .crafted import write_adapters, zeroed

PEAK = """
import json, sys, threading
from mergekit_lowrank.diagnostics import diagnose

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak_of(recipe):
    before, peak, stop = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    diagnose(recipe, executor="serial")
    stop.set()
    watcher.join()
    return peak - before

recipes = json.loads(sys.argv[1])
print(json.dumps([peak_of(recipe) for recipe in recipes][1:]))  # the first is for what is made once
"""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}


def recipe_of(paths: list[str], method: str = "linear", **keys: object) -> dict[str, object]:
    return {"merge_method": method, "models": [{"model": path} for path in paths], **keys}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three adapters of four modules, of which the last adapter lacks one."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), layers=2)


@pytest.fixture(scope="module")
def diagnosis(paths: list[str]) -> Diagnosis:
    return diagnose(recipe_of(paths), executor="serial")


def test_every_executor_gives_the_same_bytes(paths: list[str]) -> None:
    """Of a method that draws at random and one that has a survey before it; only one is sent to another process."""
    for method, executors in (("dare_ties", ("serial", "threads", "processes")), ("knots", ("serial", "threads"))):
        made = [
            diagnose(recipe_of(paths, method), executor=name, workers=2 if name == "threads" else 1).to_json()
            for name in executors
        ]
        assert len(set(made)) == 1


BUILT_IN = Registry()


@pytest.mark.parametrize("method", sorted(BUILT_IN.methods))
def test_every_method_can_be_diagnosed(paths: list[str], method: str) -> None:
    used = paths[:2] if method in ("slerp", "nuslerp") else paths
    found = diagnose(recipe_of(used, method), registry=BUILT_IN, executor="serial")
    assert len(found.modules) == 4
    heads = [own for module in found.modules for own in module.robustness_head]
    assert all(own is None or -1 <= own <= 1 for own in heads)


def test_modules_stand_in_the_order_of_the_plan(paths: list[str], diagnosis: Diagnosis) -> None:
    assert [own.module for own in diagnosis.modules] == [own.name for own in plan(recipe_of(paths)).modules]


def test_an_input_without_a_module_is_no_participant_there(diagnosis: Diagnosis) -> None:
    first, *rest = diagnosis.modules
    assert len(first.participants) == 2
    assert all(len(own.participants) == 3 for own in rest)
    assert [own.modules for own in diagnosis.inputs] == [4, 4, 3]


def test_totals_are_those_of_all_modules_taken_together(diagnosis: Diagnosis) -> None:
    label = diagnosis.inputs[0].label
    norms = [own.norms[own.participants.index(label)] for own in diagnosis.modules]
    assert diagnosis.inputs[0].norm == pytest.approx(math.hypot(*norms))
    assert sum(own.share or 0 for own in diagnosis.inputs) == pytest.approx(1)
    products = [own.cosines[0][1] * own.norms[0] * own.norms[1] for own in diagnosis.modules]  # type: ignore[operator]
    lengths = [math.hypot(*(own.norms[t] for own in diagnosis.modules)) for t in (0, 1)]
    assert diagnosis.pairs.cosines[0][1] == pytest.approx(sum(products) / math.prod(lengths))
    assert diagnosis.pairs.cosines[1][0] == pytest.approx(diagnosis.pairs.cosines[0][1])


def test_means_are_weighted_with_the_energy(diagnosis: Diagnosis) -> None:
    weights = [own.norms[0] * own.norms[1] for own in diagnosis.modules]
    overlaps = [own.row_overlaps[0][1] or 0 for own in diagnosis.modules]
    mean = sum(w * own for w, own in zip(weights, overlaps, strict=True)) / sum(weights)
    assert diagnosis.pairs.row_overlaps[0][1] == pytest.approx(mean)


def test_a_diagnosis_is_read_again_from_its_json(diagnosis: Diagnosis) -> None:
    assert Diagnosis.model_validate_json(diagnosis.to_json()) == diagnosis
    assert json.loads(diagnosis.to_json())["schema_version"] == 1


def test_a_notebook_shows_inputs_and_findings_with_text_escaped(diagnosis: Diagnosis) -> None:
    evil = diagnosis.inputs[0].model_copy(update={"label": "<script>"})
    shown = diagnosis.model_copy(update={"inputs": (evil, *diagnosis.inputs[1:])})._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "coverage" in [own.rule for own in diagnosis.findings]
    assert "do not have the same modules" in shown


def test_reporters_hear_of_every_module(paths: list[str]) -> None:
    class Listener(Reporter):
        name, summary = "listener", "notes modules"

        def __init__(self) -> None:
            self.heard: list[str] = []

        def handle(self, event: Event) -> None:
            if isinstance(event, SurveyRound):
                self.heard.append(event.module)

    listener = Listener()
    found = diagnose(recipe_of(paths), reporters=[listener], executor="serial")
    assert sorted(listener.heard) == sorted(own.module for own in found.modules)


def test_the_benchmark_measures_a_diagnosis(paths: list[str]) -> None:
    assert diagnosed(recipe_of(paths)).keys() == {"wall_seconds", "cpu_seconds", "peak_bytes"}


def test_a_sweep_is_refused(paths: list[str]) -> None:
    recipe = recipe_of(paths, "ties", sweep={"parameters.density": [0.2, 0.5]})
    with pytest.raises(MergeError, match="a sweep of 2 variants, and a diagnosis is of one merge"):
        diagnose(recipe)


def test_warnings_of_the_plan_are_told_and_refused_under_strict(paths: list[str], diagnosis: Diagnosis) -> None:
    assert any("lacks 1 of 4 modules" in warning for warning in diagnosis.warnings)
    with pytest.raises(MergeError, match="warnings are errors under --strict"):
        diagnose(recipe_of(paths), strict=True)


def test_full_fine_tunes_have_what_needs_no_factors(tmp_path: Path) -> None:
    name = "layers.0.q_proj"
    base, deltas = torch.randn(20, 16), [torch.randn(20, 16), torch.randn(20, 16)]
    for label, tensor in {"base": base, "a": base + deltas[0], "b": base + deltas[1]}.items():
        (tmp_path / label).mkdir()
        (tmp_path / label / "config.json").write_text('{"model_type": "tiny"}')
        save_file({f"{name}.weight": tensor}, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
    adapter = write_tiny_adapter(tmp_path / "lora", {name: (20, 16)}, rank=2, base_model=str(tmp_path / "base"))
    recipe = recipe_of([str(tmp_path / "a"), str(tmp_path / "b"), str(adapter)], "task_arithmetic")
    found = diagnose({**recipe, "base_model": str(tmp_path / "base"), "output": {"kind": "model"}}, executor="serial")
    (module,) = found.modules
    assert module.norms[:2] == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-4)
    wanted = float((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm())
    assert module.cosines[0][1] == pytest.approx(wanted, abs=1e-5)
    assert module.sign_conflicts[0][1] == pytest.approx(
        float((deltas[0].sign() != deltas[1].sign()).double().mean()), abs=0.01
    )
    assert (module.ranks, module.output_rank, module.is_cut) == ((None, None, 2), None, False)
    assert module.row_overlaps == ((None,) * 3, (None,) * 3, (None, None, pytest.approx(1)))
    assert module.robustness_head[:2] == (None, None)
    assert module.robustness_head[2] is not None
    assert module.sum_effective_rank is None
    assert found.unmeasured[0].modules == (name,)
    assert found.findings[-1].rule == "unmeasured"
    assert "not everything was measured in the only module: an input has no factors" in found.findings[-1].message


@pytest.mark.parametrize(("extras", "is_update"), [("average", False), ("delta", True)])
def test_parameters_that_are_stored_as_they_are_are_no_updates(tmp_path: Path, extras: str, is_update: bool) -> None:
    """Heads that are nearly alike would make the inputs look like copies of each other."""
    head = torch.randn(3, 10)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "tiny"}')
    base = {"layers.0.q.weight": torch.zeros(12, 10), "head.weight": head}
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    paths = [write_tiny_adapter(tmp_path / str(n), {"layers.0.q": (12, 10)}, seed=n) for n in (1, 2)]
    for path in paths:
        stored = load_file(path / "adapter_model.safetensors")
        saved = head + torch.randn(3, 10)
        save_file({**stored, "base_model.model.head.weight": saved}, path / "adapter_model.safetensors")
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["head"]}))
    recipe = recipe_of([str(path) for path in paths], extras=extras, base_model=str(tmp_path / "base"))
    found = diagnose(recipe, executor="serial")
    assert [own.module for own in found.modules] == ["layers.0.q", *(["head"] if is_update else [])]
    assert found.unmeasured[0].modules == ("head",)
    told = "an input has no factors" if is_update else "they hold parameters as they are"
    assert f"not everything was measured in 1 module (head): {told}" in found.findings[-1].message


def test_large_modules_are_sampled_for_signs_and_say_so(tmp_path: Path) -> None:
    paths = [str(write_tiny_adapter(tmp_path / str(seed), {"q": (160, 140)}, seed=seed)) for seed in (1, 2)]
    found = diagnose(recipe_of(paths), executor="serial")
    assert found.sampled
    assert 0 < found.modules[0].sign_conflicts_error < 0.05


def test_zero_modules_do_not_disturb_the_means_of_others(tmp_path: Path) -> None:
    paths = write_adapters(tmp_path, layers=2, inputs=2)
    before = diagnose(recipe_of(paths), executor="serial")
    zeroed(paths[0], [before.modules[1].module])
    after = diagnose(recipe_of(paths), executor="serial")
    assert after.modules[1].cosines[0][1] is None
    assert after.pairs.row_overlaps[0][1] is not None
    assert after.modules[0] == before.modules[0]


@pytest.mark.parametrize("method", ["robustmerge", "linear", "ties"])
@pytest.mark.parametrize(("shape", "rank", "inputs"), [((512, 384), 16, 4), ((96, 80), 64, 6)])
def test_a_module_holds_no_more_than_its_plan_says(
    tmp_path: Path, method: str, shape: tuple[int, int], rank: int, inputs: int
) -> None:
    """Identical inputs, so that bases are formed; and ranks that add up to more than the module has."""
    adapter = str(write_tiny_adapter(tmp_path / "a", {"q": shape}, rank=rank))
    made = with_room(plan(recipe_of([adapter] * inputs, method)))
    module, measure = made.modules[0], ModuleMeasure(made, {})
    read = read_updates(made, module)
    measure("q", Encodings(read, CpuDevice()))  # what is imported at a first time
    found = held(lambda: measure("q", Encodings(read, CpuDevice())))
    assert found.peak_bytes + module.stored_bytes <= module.peak_bytes + (1 << 20)


def test_ranks_that_are_too_many_for_the_memory_are_refused(tmp_path: Path) -> None:
    adapter = str(write_tiny_adapter(tmp_path / "a", {"q": (96, 80)}, rank=64))
    recipe = recipe_of([adapter] * 6, "robustmerge")
    made = plan(recipe)
    with pytest.raises(
        MemoryBudgetError, match=r"to diagnose module 'q' takes [\d.]+ MiB, .* add up to 384; .* Allow "
    ):
        diagnose(recipe, memory_bytes=made.peak_bytes + made.overhead_bytes, executor="serial")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_number_of_modules(tmp_path: Path) -> None:
    recipes = []
    for layers in (1, 4, 40):
        modules = {f"layers.{layer}.q": (1024, 1024) for layer in range(layers)}
        root = tmp_path / str(layers)
        recipes.append(recipe_of([str(write_tiny_adapter(root / str(n), modules, rank=16, seed=n)) for n in range(4)]))
    result = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(recipes)],
        env={**os.environ, **RETURNING},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    few, many = json.loads(result.stdout)
    # The inputs of the large one alone are 21 MB: a diagnosis that kept them would show.
    assert many < few + 8e6
