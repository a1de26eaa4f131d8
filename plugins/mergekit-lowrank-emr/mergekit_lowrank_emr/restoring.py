"""A task's adapter, from the unified adapter and the task's masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lowrank import Adapter, CheckpointError
from mergekit_lowrank_emr.strategy import unpacked

__all__ = ["restore"]

FACTORS = ("A", "B")
Modules = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Merged:
    """A directory that ``emr`` wrote.

    Attributes:
        config: of the unified adapter.
        labels: of the inputs, in the recipe's order.
        factors: {module: {"A" or "B": tensor}}.
        artefacts: {module: {name: tensor}}.
        names: {module: {"A" or "B": name of the tensor in the adapter}}.
    """

    config: Mapping[str, object]
    labels: tuple[str, ...]
    factors: Modules
    artefacts: Modules
    names: Mapping[str, Mapping[str, str]]


def restore(merged: Path | str, task: str | int, output: Path | str, *, overwrite: bool = False) -> Path:
    """Write the adapter of one task: λ_A M_A ⊙ A and λ_B M_B ⊙ B, a PEFT directory like any other.

    λ = Σ |y_t| / Σ |M_t ⊙ y_uni| over all modules, for the factors A and for the factors B: the paper has one λ for
    both, which would depend on how an update's size is shared between its factors. Modules that the task's input
    lacked are zero; modules that another method merged, by a rule of the recipe, are as they were merged.

    Args:
        merged: what ``mergekit-lowrank merge`` wrote with ``merge_method: emr``.
        task: label of the input (its directory's name), or its position in the recipe, from 0; of text that may be
            either, the label.
        output: the directory to write.
        overwrite: whether it may exist.

    Raises:
        CheckpointError: ``merged`` is not what ``emr`` wrote, or has no such task.
    """
    read = _read(Path(merged))
    index = _index(read, task)
    tensors = {read.names[module][factor]: t for module, own in read.factors.items() for factor, t in own.items()}
    for factor in FACTORS:
        masked = _masked(read, factor, index)
        scale = _scale(read, factor, index, masked)
        for module, tensor in masked.items():
            tensors[read.names[module][factor]] = (tensor * scale).to(read.factors[module][factor].dtype)
    return Adapter(tensors, read.config).save(output, overwrite=overwrite)


def _read(directory: Path) -> Merged:
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        stored = load_file(directory / "adapter_model.safetensors")
        beside = load_file(directory / "artefacts.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be read as a merge with emr: {error}") from error
    names: dict[str, dict[str, str]] = {}
    for name in stored:
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        names.setdefault(module, {})[factor] = name
    factors = {module: {factor: stored[name] for factor, name in own.items()} for module, own in names.items()}
    artefacts = {
        module: {k.removeprefix(f"{module}."): v for k, v in beside.items() if k.startswith(f"{module}.")}
        for module in names
    }
    if not any("A.masks" in own for own in artefacts.values()):
        raise CheckpointError(f"{directory}: no module has masks; was it merged with emr?")
    return Merged(config, tuple(source["label"] for source in manifest["sources"]), factors, artefacts, names)


def _index(read: Merged, task: str | int) -> int:
    if isinstance(task, int) and 0 <= task < len(read.labels):
        return task
    if isinstance(task, str) and read.labels.count(task) == 1:
        return read.labels.index(task)
    if isinstance(task, str) and task.isdecimal() and int(task) < len(read.labels):
        return int(task)
    known = ", ".join(f"{position} '{label}'" for position, label in enumerate(read.labels))
    raise CheckpointError(f"there is no single task {task!r}; the merge has: {known}")


def _masked(read: Merged, factor: str, index: int) -> dict[str, Tensor]:
    """{module: M_t ⊙ y_uni} in float64, of the modules with masks; zero where the input lacked the module."""
    masked = (module for module, own in read.artefacts.items() if "A.masks" in own)
    return {module: _masked_module(read, module, factor, index) for module in masked}


def _masked_module(read: Merged, module: str, factor: str, index: int) -> Tensor:
    unified, own = read.factors[module][factor].double(), read.artefacts[module]
    if factor == "B" and own["scale"]:
        unified = unified / own["scale"]
    result = torch.zeros_like(unified)
    participants = own["participants"].tolist()
    if index in participants:
        bits = own[f"{factor}.masks"][participants.index(index)]
        # The adapter may be padded with zeros to a larger rank: along the rows of A, along the columns of B.
        columns = unified.shape[1] if factor == "A" else int(own["A.masks"].shape[1])
        mask = unpacked(bits, columns)
        result[: mask.shape[0], : mask.shape[1]] = unified[: mask.shape[0], : mask.shape[1]] * mask
    return result


def _scale(read: Merged, factor: str, index: int, masked: Mapping[str, Tensor]) -> float:
    own = sum(
        float(found[f"{factor}.sums"][found["participants"].tolist().index(index)])
        for found in map(read.artefacts.__getitem__, masked)
        if index in found["participants"].tolist()
    )
    kept = sum(float(tensor.abs().sum()) for tensor in masked.values())
    return own / kept if kept > 0 else 1.0
