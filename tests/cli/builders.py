"""Tiny adapters, and the command line as tests run it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank.cli import main

MODULES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file and directory below, hidden ones too, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def tensors(
    modules: Sequence[str] = MODULES, *, seed: int = 0, rank: int = 2, d_out: int = 6, d_in: int = 5
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    return made


def write_config(directory: Path, **settings: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def write_adapter(directory: Path, made: dict[str, Tensor] | None = None, **settings: object) -> Path:
    write_config(directory, **settings)
    save_file(tensors() if made is None else made, directory / "adapter_model.safetensors")
    return directory


def write_model(directory: Path) -> Path:
    """A base for the adapters: their modules, and one tensor that they leave alone."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    made = {f"{module}.weight": torch.ones(6, 5) for module in MODULES}
    save_file({**made, "norm.weight": torch.ones(20)}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_recipe(path: Path, *models: Path | str, method: str = "ties") -> Path:
    lines = [f"merge_method: {method}", "models:", *(f"- model: {json.dumps(str(model))}" for model in models)]
    path.write_text("\n".join(lines) + "\n")
    return path
