"""Tensors that a strategy returns beside the merged update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import ElementwiseStrategy, MergeError, Registry, hookimpl, merge
from tests.engine.makers import MODULES, adapters, recipe_of


def registry_with(give) -> Registry:
    class Counting(ElementwiseStrategy):
        name = "counting"
        summary = "adds up, and counts"

        def merge_block(self, block, weights, context):
            return (block * weights).sum(dim=0)

        def artefacts(self, coordinates, written, scale, context):
            return give(coordinates, written, scale, context)

    class Plugin:
        @hookimpl
        def strategies(self):
            return [Counting]

    registry = Registry()
    registry.register(Plugin(), "counting-plugin")
    return registry


def facts(coordinates, written, scale, context):
    return {
        "inputs": torch.tensor(len(coordinates.updates)),
        "norm": (written.b.double() @ written.a.double()).norm(),
        "scale": torch.tensor(scale),
    }


@pytest.mark.parametrize("rank", ["max", {"energy": 0.9}])
def test_artefacts_are_of_what_was_written_and_listed_in_the_manifest(tmp_path: Path, rank) -> None:
    recipe = recipe_of(adapters(tmp_path), "counting", scale=0.5, output={"rank": rank})
    merge(recipe, tmp_path / "out", registry=registry_with(facts))
    found = load_file(tmp_path / "out" / "artefacts.safetensors")
    assert set(found) == {f"{module}.{name}" for module in MODULES for name in ("inputs", "norm", "scale")}
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in MODULES:
        b, a = (stored[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "BA")
        assert float(found[f"{module}.norm"]) == pytest.approx(float((b @ a).norm()), rel=1e-6)
        assert float(found[f"{module}.scale"]) == 0.5
    assert '"artefacts.safetensors"' in (tmp_path / "out" / "manifest.json").read_text()
    assert not (tmp_path / "out" / "artefacts").exists()


def test_an_output_with_artefacts_may_be_overwritten(tmp_path: Path) -> None:
    paths = adapters(tmp_path)
    merge(recipe_of(paths, "counting"), tmp_path / "out", registry=registry_with(facts))
    merge(recipe_of(paths), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "artefacts.safetensors").exists()


def test_in_memory_they_are_the_same_and_saved_with_the_adapter(tmp_path: Path) -> None:
    recipe, registry = recipe_of(adapters(tmp_path), "counting"), registry_with(facts)
    found = merge(recipe, registry=registry)
    merge(recipe, tmp_path / "out", registry=registry)
    found.save(tmp_path / "saved")
    for directory in ("out", "saved"):
        stored = load_file(tmp_path / directory / "artefacts.safetensors")
        assert {name: float(tensor) for name, tensor in stored.items()} == pytest.approx(
            {name: float(tensor) for name, tensor in found.artefacts.items()}
        )


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda *_: [1], "artefacts returned a list"),
        (lambda *_: {"x": 1.0}, "artefact 'x' is a float; expected a tensor"),
        (lambda *_: {1: torch.ones(1)}, "artefact 1 is a Tensor; expected a tensor under a text"),
        (lambda *_: {"x": torch.ones(1, dtype=torch.complex64)}, "'x' is strided of complex64, which safetensors"),
        (lambda *_: {"x": torch.ones(1).to_sparse()}, "'x' is sparse_coo of float32, which safetensors"),
        (lambda *_: {"x": torch.tensor(float("nan"))}, "artefact 'x' holds values that are not finite"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_stored_names_the_strategy_and_leaves_nothing(tmp_path: Path, give, message: str) -> None:
    with pytest.raises(MergeError, match="strategy 'counting' of plugin 'counting-plugin'") as caught:
        merge(recipe_of(adapters(tmp_path), "counting"), tmp_path / "out", registry=registry_with(give))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
