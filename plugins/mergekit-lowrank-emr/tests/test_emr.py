"""EMR against the paper's formulas, and restored adapters through files."""

from __future__ import annotations

import json
from pathlib import Path

import mergekit_lowrank_emr
import pytest
import torch
from click.testing import CliRunner
from mergekit_lowrank_emr import Emr, restore
from mergekit_lowrank_emr.__main__ import main
from mergekit_lowrank_emr.strategy import packed, unpacked
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lowrank import CheckpointError, MergeError, Registry, merge
from mergekit_lowrank.testing import StrategyContract, write_tiny_adapter

MODULES = {"layers.0.q": (12, 10), "layers.1.q": (9, 17)}


class TestEmr(StrategyContract):
    strategy = Emr


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    registry.register(mergekit_lowrank_emr, "emr")
    return registry


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [write_tiny_adapter(tmp_path / f"task{t}", MODULES, rank=3, seed=t, lora_alpha=6 - t) for t in range(3)]


@pytest.fixture
def merged(tmp_path: Path, adapters: list[Path], registry: Registry) -> Path:
    recipe = {"merge_method": "emr", "models": [{"model": str(path)} for path in adapters]}
    merge(recipe, tmp_path / "merged", registry=registry)
    return tmp_path / "merged"


def scaled_factors(path: Path) -> dict[str, Tensor]:
    """Every factor times √scaling, in float64."""
    config = json.loads((path / "adapter_config.json").read_text())
    root = (config["lora_alpha"] / config["r"]) ** 0.5
    return {name: tensor.double() * root for name, tensor in load_file(path / "adapter_model.safetensors").items()}


def unified_by_formula(stack: Tensor) -> Tensor:
    """γ ⊙ ε (section 3.2): entry by entry."""
    result = torch.zeros(stack.shape[1:], dtype=stack.dtype)
    for place in torch.cartesian_prod(*map(torch.arange, stack.shape[1:])).tolist():
        own = stack[(slice(None), *place)]
        sign = torch.sign(own.sum()) or -torch.ones(())
        result[tuple(place)] = sign * max((abs(float(x)) for x in own if torch.sign(x) == sign), default=0.0)
    return result


def test_the_unified_factors_equal_the_formula(merged: Path, adapters: list[Path]) -> None:
    found = load_file(merged / "adapter_model.safetensors")
    inputs = [scaled_factors(path) for path in adapters]
    for name, tensor in found.items():
        expected = unified_by_formula(torch.stack([own[name] for own in inputs]))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_restored_adapter_equals_the_formula(merged: Path, adapters: list[Path], tmp_path: Path, task: int) -> None:
    found = load_file(restore(merged, f"task{task}", tmp_path / "restored") / "adapter_model.safetensors")
    own, unified = scaled_factors(adapters[task]), load_file(merged / "adapter_model.safetensors")
    for factor in ("lora_A", "lora_B"):
        names = [name for name in found if factor in name]
        masked = {name: unified[name].double() * (own[name] * unified[name] > 0) for name in names}
        scale = sum(own[n].abs().sum() for n in names) / sum(masked[n].abs().sum() for n in names)
        for name in names:
            torch.testing.assert_close(found[name].double(), masked[name] * scale, rtol=0, atol=1e-5)


def test_a_single_input_is_restored_as_it_was(tmp_path: Path, adapters: list[Path], registry: Registry) -> None:
    merge({"merge_method": "emr", "models": [{"model": str(adapters[0])}]}, tmp_path / "one", registry=registry)
    found = load_file(restore(tmp_path / "one", 0, tmp_path / "restored") / "adapter_model.safetensors")
    for name, expected in scaled_factors(adapters[0]).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scale",
    [{"scale": 0.25}, {"scale": "auto"}, {"scale": -1.0}, {"rules": [{"match": "layers.1", "scale": 3.0}]}],
    ids=str,
)
def test_the_scale_of_the_merge_does_not_change_what_is_restored(
    tmp_path: Path, adapters: list[Path], registry: Registry, merged: Path, scale: dict[str, object]
) -> None:
    models = [{"model": str(path)} for path in adapters]
    merge({"merge_method": "emr", "models": models} | scale, tmp_path / "small", registry=registry)
    expected = load_file(restore(merged, 1, tmp_path / "a") / "adapter_model.safetensors")
    found = load_file(restore(tmp_path / "small", 1, tmp_path / "b") / "adapter_model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_mixed_ranks_and_modules_that_an_input_lacks(tmp_path: Path, registry: Registry) -> None:
    wide = write_tiny_adapter(tmp_path / "wide", MODULES, rank=4, seed=1)
    narrow = write_tiny_adapter(tmp_path / "narrow", {"layers.0.q": MODULES["layers.0.q"]}, rank=2, seed=2)
    models = [{"model": str(wide)}, {"model": str(narrow)}]
    merge({"merge_method": "emr", "models": models}, tmp_path / "out", registry=registry)
    found = load_file(restore(tmp_path / "out", "narrow", tmp_path / "restored") / "adapter_model.safetensors")
    assert all(tensor.abs().max() == 0 for name, tensor in found.items() if "layers.1" in name)
    a = found["base_model.model.layers.0.q.lora_A.weight"]
    assert a.shape == (4, 10)
    assert a[:2].abs().max() > 0
    assert a[2:].abs().max() == 0


def test_modules_that_another_method_merged_are_restored_as_they_are(
    tmp_path: Path, adapters: list[Path], registry: Registry
) -> None:
    rule = {"match": "layers.1", "merge_method": "task_arithmetic"}
    recipe = {"merge_method": "emr", "models": [{"model": str(path)} for path in adapters], "rules": [rule]}
    merge(recipe, tmp_path / "out", registry=registry)
    unified = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = load_file(restore(tmp_path / "out", 0, tmp_path / "restored") / "adapter_model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, unified[name]) == ("layers.1" in name)


def test_a_module_smaller_than_the_rank_is_unified_and_restored(tmp_path: Path, registry: Registry) -> None:
    modules = {"q": (12, 10), "score": (2, 10)}
    paths = [write_tiny_adapter(tmp_path / f"task{t}", modules, rank=4, seed=t) for t in range(2)]
    merge({"merge_method": "emr", "models": [{"model": str(p)} for p in paths]}, tmp_path / "out", registry=registry)
    restore(tmp_path / "out", 1, tmp_path / "restored")


def test_labels_that_are_numbers_win_over_positions(tmp_path: Path, registry: Registry) -> None:
    paths = [write_tiny_adapter(tmp_path / name, MODULES, seed=int(name)) for name in ("1", "0")]
    merge({"merge_method": "emr", "models": [{"model": str(p)} for p in paths]}, tmp_path / "out", registry=registry)
    by_label = load_file(restore(tmp_path / "out", "1", tmp_path / "a") / "adapter_model.safetensors")
    by_position = load_file(restore(tmp_path / "out", 0, tmp_path / "b") / "adapter_model.safetensors")
    assert all(torch.equal(tensor, by_position[name]) for name, tensor in by_label.items())


def test_in_memory_the_artefacts_are_at_hand(adapters: list[Path], registry: Registry) -> None:
    recipe = {"merge_method": "emr", "models": [{"model": str(path)} for path in adapters]}
    found = merge(recipe, registry=registry)
    assert found.artefacts["layers.0.q.A.masks"].shape == (3, 3, 2)
    assert found.artefacts["layers.1.q.B.masks"].shape == (3, 9, 1)
    assert found.artefacts["layers.1.q.participants"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("output", [{"rank": 2}, {"balance": True}, {"rank": {"energy": 0.5}}])
def test_an_output_that_would_change_the_factors_is_refused(
    adapters: list[Path], registry: Registry, tmp_path: Path, output: dict[str, object]
) -> None:
    recipe = {"merge_method": "emr", "models": [{"model": str(path)} for path in adapters], "output": output}
    with pytest.raises(MergeError, match="'emr' needs its factors written as they are"):
        merge(recipe, tmp_path / "out", registry=registry)
    assert not (tmp_path / "out").exists()


def test_masks_survive_packing() -> None:
    masks = torch.rand(3, 5, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    assert packed(masks).shape == (3, 5, 2)
    assert torch.equal(unpacked(packed(masks), 11), masks)


def test_the_command_restores_by_label_or_position(merged: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    for task, output in (("task2", "by_label"), ("2", "by_position")):
        assert runner.invoke(main, [str(merged), task, str(tmp_path / output)]).exit_code == 0
    first, second = (load_file(tmp_path / o / "adapter_model.safetensors") for o in ("by_label", "by_position"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unknown_task_and_a_directory_without_masks_are_errors(
    merged: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"there is no single task 'task9'; the merge has: 0 'task0', 1 'task1'"):
        restore(merged, "task9", tmp_path / "x")
    result = CliRunner().invoke(main, [str(adapters[0]), "0", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "cannot be read as a merge with emr" in result.output
    assert not (tmp_path / "x").exists()
