"""Where decompositions and element-wise stages run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.lowrank import LowRankUpdate, converted

__all__ = ["move", "prepare", "select_device"]


def select_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; auto prefers CUDA, then the CPU.

    Raises:
        RecipeError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"unknown device '{name}'; expected auto, cpu, cuda, cuda:N or mps") from error
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in found:
        raise RecipeError(f"device '{name}' is not supported; expected auto, cpu, cuda, cuda:N or mps")
    if (device.index or 0) >= found[device.type]:
        raise RecipeError(f"device '{name}' was asked for, but this machine has {found[device.type]} of its kind")
    return device


def prepare(device: torch.device) -> None:
    """Load what several threads would load at once: torch's first CUDA decomposition fails if it is not alone."""
    if device.type == "cuda":
        torch.linalg.inv(torch.ones(1, 1, device=device))


def move(updates: Sequence[LowRankUpdate], device: torch.device, dtype: torch.dtype) -> list[LowRankUpdate]:
    """The updates on ``device`` in ``dtype``.

    For CUDA each factor is sent in its stored type from pinned memory, without waiting, and widened there.
    """
    if device.type == "cpu":
        return converted(updates, dtype)
    if device.type != "cuda":
        return [update.to(device, dtype) for update in updates]
    pinned = [LowRankUpdate(u.b.pin_memory(), u.a.pin_memory(), u.scaling) for u in updates]
    return [
        LowRankUpdate(u.b.to(device, non_blocking=True), u.a.to(device, non_blocking=True), u.scaling).to(device, dtype)
        for u in pinned
    ]
