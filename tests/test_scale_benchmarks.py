"""The scale benchmarks' own parts, on models of a few kilobytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import merge
from mergekit_lowrank.formats import ModelDirectory
from tests.benchmarks import measuring
from tests.benchmarks.scale import __main__ as command
from tests.benchmarks.scale import folds, jobs, models, peaks, references
from tests.benchmarks.shapes import write_set

TINY = models.Llama("tiny", layers=2, width=16, keys=8, hidden=24, words=40, head=8)
KEYS = [key for key in TINY.shapes if "proj" in key]

needs_proc = pytest.mark.skipif(not peaks.status_bytes("RssAnon"), reason="reads /proc")


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    """Two fine-tunes of ``TINY``, beside their base."""
    models.write_base(tmp_path / "base", TINY)
    return [models.write_fine_tune(tmp_path / f"tuned{s}", TINY, s) for s in (1, 2)]


def merged(method: str, tuned: list[Path]) -> Path:
    """The directory of their merge."""
    where = tuned[0].parent
    recipe = jobs.recipe_of(method, tuned, base_model=str(where / "base"), output={"kind": "model"})
    merge(recipe, where / "out")
    return where / "out"


def test_the_models_are_as_large_as_they_are_said_to_be() -> None:
    entries = {
        m.name: sum(torch.Size(s).numel() for s in m.shapes.values()) for m in (models.LLAMA_3B, models.LLAMA_1B)
    }
    assert [round(2 * n / 1e9, 2) for n in entries.values()] == [6.43, 1.57]
    assert len(models.LLAMA_70B.linear.modules) == 560


def test_a_base_is_a_model_in_shards_of_about_one_size(tmp_path: Path) -> None:
    base = ModelDirectory(models.write_base(tmp_path, TINY, shards=3))
    assert {key: spec.shape for key, spec in base.source.specs.items()} == TINY.shapes
    sizes = [path.stat().st_size for path in base.shards]
    assert len(sizes) == 3
    assert max(sizes) < 2 * min(sizes)


def test_a_fine_tune_is_its_base_and_a_small_change(tuned: list[Path]) -> None:
    base, own = (load_file(path / "model.safetensors") for path in (tuned[0].parent / "base", tuned[0]))
    changes = torch.cat([(own[key] - base[key]).flatten() for key in TINY.shapes])
    assert float(changes.std()) == pytest.approx(models.CHANGE, rel=0.05)


@pytest.mark.parametrize("method", references.METHODS)
def test_a_merge_is_what_the_formulas_give(method: str, tuned: list[Path]) -> None:
    found = references.compared(method, tuned[0].parent / "base", tuned, merged(method, tuned), KEYS)
    assert found["entries"] == sum(torch.Size(TINY.shapes[key]).numel() for key in KEYS)
    assert found["equal_share"] > 0.999
    assert found["worst"] < 0.51


def test_another_result_is_found_out(tuned: list[Path]) -> None:
    out = merged("linear", tuned)
    assert references.compared("ties", tuned[0].parent / "base", tuned, out, KEYS)["equal_share"] < 0.9


def test_a_deviation_is_told_in_last_places(tuned: list[Path]) -> None:
    base, out = tuned[0].parent / "base", merged("ties", tuned)
    weights = load_file(out / "model.safetensors")
    weights[KEYS[0]][0, 0] *= 1 + 8 * torch.finfo(torch.bfloat16).eps
    save_file(weights, out / "model.safetensors")
    assert 7 < references.compared("ties", base, tuned, out, KEYS[:1])["worst"] < 17


@needs_proc
def test_a_merge_in_an_interpreter_of_its_own_is_measured(tmp_path: Path) -> None:
    recipe = jobs.recipe_of("linear", write_set(tmp_path, TINY.linear, inputs=2, rank=2))
    found = peaks.in_interpreter(recipe, tmp_path / "out", memory_bytes=1 << 30)
    assert 0 < found["peak_bytes"] < 64 << 20
    assert found["samples"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_merge_that_fails_there_ends_the_run_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        peaks.in_interpreter(jobs.recipe_of("linear", ["nowhere", "nowhere"]), tmp_path / "out")


@needs_proc
def test_memory_that_is_held_for_a_moment_is_seen() -> None:
    watch = peaks.Watch()
    before, held = watch.samples, torch.ones(64 << 20, dtype=torch.uint8)
    while watch.samples < before + 3:
        pass
    del held
    watch.stop()
    assert (64 << 20) * 0.9 < watch.peak_bytes < (64 << 20) * 1.5


def test_a_copy_leaves_nothing(tmp_path: Path) -> None:
    base, out = models.write_base(tmp_path / "base", TINY), tmp_path / "out"
    assert folds.copied(str(base), str(out))["wall_seconds"] > 0
    assert not out.exists()


def test_targets_are_those_of_whole_models() -> None:
    job = jobs.Job("M0", ["", "budget"], [["linear", "1 MiB"]])
    job.within("a merge", {"peak_bytes": 2 << 20}, 1 << 20)
    settings: dict[str, Any] = {"quick": False}
    where = {"processor": "x", "processors": 1, "system": "y", "versions": {}, "date": "z", "settings": settings}
    found = {"M0": {"targets": job.targets, "text": job.text, "environment": where}}
    assert "| a merge within 1.0 MiB | 2.0 MiB | **no** |" in command.page(found)
    settings["quick"] = True
    assert "a merge within" not in command.page(found)


@needs_proc
@pytest.mark.slow
@pytest.mark.skipif("RUN_BENCHMARKS" not in os.environ, reason="takes minutes; set RUN_BENCHMARKS to run it")
def test_every_job_runs_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(measuring, "isolated", here)
    monkeypatch.setattr(jobs, "QUICK_DIVISOR", 64)
    command.main([str(tmp_path), "--quick", "--no-peers"])
    found = json.loads((tmp_path / "scale.json").read_text())
    assert list(found) == list(jobs.JOBS)
    assert all(job["rows"] and job["figures"] for job in found.values())
    page = (tmp_path / "scale.md").read_text()
    assert all(job["title"] in page for job in found.values())
    assert not (tmp_path / "work").exists()
