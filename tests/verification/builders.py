"""Merges to verify, and ways to spoil them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lowrank import merge
from mergekit_lowrank.api import verify
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.manifest import sha256_of
from mergekit_lowrank.testing import write_tiny_adapter
from mergekit_lowrank.verification import Fault, Verification
from tests.formats.builders import write_model

MODULES = {f"model.layers.{layer}.{name}": (12, 10) for layer in range(2) for name in ("q_proj", "v_proj")}
FIRST = "model.layers.0.q_proj"
KEY_B = f"base_model.model.{FIRST}.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"


def adapters(root: Path, count: int = 3, **options: Any) -> list[Path]:
    return [
        write_tiny_adapter(root / f"in{seed}", MODULES, rank=3, seed=seed, **options) for seed in range(1, count + 1)
    ]


def recipe_of(paths: list[Path], method: str = "ties", **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


def base_of(root: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with the modules of the adapters, whose weights are 30 times as large as the updates, and a norm."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": 100 * torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    tensors["model.norm.weight"] = torch.randn(12, generator=generator)
    return write_model(root / "base", {key: tensor.to(dtype) for key, tensor in tensors.items()})


@pytest.fixture(scope="module")
def registry() -> Registry:
    """The built-ins alone."""
    return Registry()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Path:
    """A directory with three adapters and what ``ties`` makes of them."""
    root = tmp_path_factory.mktemp("merged")
    merge(recipe_of(adapters(root), out_dtype="bfloat16"), root / "out", registry=registry)
    return root


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Path:
    """The same with a model that two of them are added to."""
    root = tmp_path_factory.mktemp("folded")
    recipe = recipe_of(adapters(root, 2), base_model=str(base_of(root)), output={"kind": "model"})
    merge(recipe, root / "out", registry=registry)
    return root


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies one of these, and gives the output in the copy."""

    def make(root: Path) -> Path:
        shutil.copytree(root, tmp_path / "copy")
        return tmp_path / "copy" / "out"

    return make


def verified(output: Path, registry: Registry, **options: Any) -> Verification:
    return verify(output, **{"registry": registry, "executor": "serial", **options})


def kinds(found: Verification) -> set[str]:
    return {fault.kind for fault in found.faults}


def fault(found: Verification, kind: str) -> Fault:
    """The first of a kind."""
    return next(fault for fault in found.faults if fault.kind == kind)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Write a safetensors file again with other tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}, path, metadata)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def hash_again(output: Path, name: str) -> None:
    """Put a changed file into the manifest, as one would who wants to hide the change."""
    outputs = json.loads((output / "manifest.json").read_text())["outputs"]
    now = {"bytes": (output / name).stat().st_size, "sha256": sha256_of(output / name)}
    change_json(output / "manifest.json", outputs=[{**own, **now} if own["name"] == name else own for own in outputs])
