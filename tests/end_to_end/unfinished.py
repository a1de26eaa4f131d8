"""Merges that are cut off, and what they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lowrank import merge
from mergekit_lowrank.events import Event, ModuleMerged, Notice, Reporter, SurveyRound
from mergekit_lowrank.testing import write_tiny_adapter
from tests.formats.builders import write_model

TIMES = ("report.html", "timings.json")
"""The only files that no two merges agree on."""
MODULES = {f"model.layers.{layer}.{name}": (12, 10) for layer in range(3) for name in ("q_proj", "v_proj")}


class Follower(Reporter):
    """Counts what is told, and raises after so many events of one kind.

    Args:
        after: how many; None to see all of the merge.
        kind: of event.
        error: what is raised; Ctrl-C by default, which is no ``Exception`` and so not the reporter's own fault.
    """

    name, summary = "follower", "counts what is told, and interrupts"

    def __init__(
        self, after: int | None = None, *, kind: type = ModuleMerged, error: type[BaseException] = KeyboardInterrupt
    ):
        self.after, self.kind, self.error = after, kind, error
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, self.kind) and self.count(self.kind) == self.after:
            raise self.error

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    @property
    def merged(self) -> int:
        """Modules that were merged, those of an earlier run apart."""
        return self.count(ModuleMerged)

    @property
    def surveyed(self) -> int:
        return self.count(SurveyRound)

    @property
    def notices(self) -> str:
        return "\n".join(event.message for event in self.events if isinstance(event, Notice))


def followed(recipe: Any, out: Path, **options: Any) -> Follower:
    """A whole merge, and what it told."""
    follower = Follower()
    merge(recipe, out, reporters=[follower], **{"executor": "serial", **options})
    return follower


def cut_off(recipe: Any, out: Path, after: int, *, kind: type = ModuleMerged, **options: Any) -> None:
    """A merge that is interrupted after so many modules, in the order of the plan."""
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, reporters=[Follower(after, kind=kind)], **{"executor": "serial", **options})


def files(directory: Path) -> dict[str, bytes]:
    """All that is the same in every run of one merge."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in TIMES)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def partial_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def recipe_of(root: Path, method: str = "linear", count: int = 3, **keys: Any) -> dict[str, Any]:
    """Of adapters with seeds 1, 2, …; made in ``root``."""
    paths = [write_tiny_adapter(root / f"in{seed}", MODULES, rank=3, seed=seed) for seed in range(1, count + 1)]
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


def parameters(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of a small model with the modules that the adapters change, and others."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 10)}
    for module, shape in MODULES.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    shapes |= {"model.norm.weight": (10,), "lm_head.weight": (16, 10)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def base_model(root: Path) -> Path:
    return write_model(root / "base", parameters(0), {"model_type": "llama", "tie_word_embeddings": False})


def fold_of(root: Path, method: str = "linear", **keys: Any) -> dict[str, Any]:
    """Adapters into a base of two files."""
    output = {"kind": "model", "shard_size": "2KB", **keys.pop("output", {})}
    return recipe_of(root, method, base_model=str(base_model(root)), output=output, **keys)


def fine_tunes_of(root: Path, method: str = "ties", **keys: Any) -> dict[str, Any]:
    """Whole models into their base."""
    base, first = base_model(root), parameters(0)
    paths = []
    for seed in (1, 2):
        changes: Mapping[str, torch.Tensor] = parameters(seed, 0.1)
        tuned = {name: tensor + changes[name] for name, tensor in first.items()}
        paths.append(write_model(root / f"tuned{seed}", tuned, {"model_type": "llama", "tie_word_embeddings": False}))
    models = [{"model": str(path)} for path in paths]
    return {"merge_method": method, "models": models, "base_model": str(base), "output": {"kind": "model"}, **keys}
