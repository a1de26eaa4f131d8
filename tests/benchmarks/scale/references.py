"""Full fine-tunes merged by the formulas alone: one whole module at a time, dense, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DENSITY = 0.2
"""The default of both methods."""
TOLERANCE = 1e-2
"""Of DRM: singular values not above this share of the largest are cut."""


def ties(deltas: Tensor) -> Tensor:
    """TIES (arXiv:2306.01708) of (N, rows, columns), as its code has it: ⌊density · n⌋ + 1 entries of each are kept."""
    kept = torch.stack([_trimmed(delta, delta.numel() - int(delta.numel() * DENSITY)) for delta in deltas])
    signs = kept.sum(dim=0).sign()
    signs[signs == 0] = 1.0 if signs.sum() > 0 else -1.0
    return _mean_of_agreeing(kept, signs)


def drm(deltas: Tensor) -> Tensor:
    """DRM-H (arXiv:2505.23117) of (N, rows, columns) by the SVD of all of them side by side."""
    inputs = len(deltas)
    # Of the transpose, which is tall: the wide one takes three times as long.
    v, s, uh = torch.linalg.svd(torch.cat([*deltas], dim=1).T, full_matrices=False)
    kept = s > TOLERANCE * s.max()
    tasks = v[:, kept].T.reshape(int(kept.sum()), inputs, -1).transpose(0, 1)
    norms = torch.linalg.vector_norm(tasks, dim=2, keepdim=True)
    unit = _trimmed(tasks / norms, tasks.numel() - round(tasks.numel() * DENSITY))
    parts = unit * norms * s[kept].view(1, -1, 1)
    return uh[kept].T @ _mean_of_agreeing(parts, parts.sum(dim=0).sign())


METHODS: Mapping[str, Callable[[Tensor], Tensor]] = {"ties": ties, "drm": drm}


def _trimmed(values: Tensor, rank: int) -> Tensor:
    """What is at or above the magnitude of this rank, counted from the smallest."""
    magnitudes = values.abs()
    threshold = torch.from_numpy(magnitudes.flatten().numpy().copy()).numpy()
    threshold.partition(rank - 1)
    return values * (magnitudes >= float(threshold[rank - 1]))


def _mean_of_agreeing(parts: Tensor, signs: Tensor) -> Tensor:
    agreeing = parts * (parts.sign() == signs)
    mean: Tensor = agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
    return mean


def compared(method: str, base: Path, tuned: Sequence[Path], output: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The written tensors beside base + merged update in float64.

    Returns:
        ``equal_share`` of the entries that are the exact result, rounded to the stored type; the ``worst`` deviation
        from it in units of the last place.
    """
    entries, equal, worst = 0, 0, 0.0
    for key in keys:
        weights, written = _read(base, key), _read(output, key)
        deltas = torch.stack([_read(path, key).double() - weights.double() for path in tuned])
        exact = weights.double() + METHODS[method](deltas)
        entries += exact.numel()
        equal += int((exact.to(written.dtype) == written).sum())
        place = torch.exp2(exact.abs().clamp(min=1e-30).log2().floor()) * torch.finfo(written.dtype).eps
        worst = max(worst, float(((written.double() - exact).abs() / place).max()))
    return {"tensors": len(keys), "entries": entries, "equal_share": equal / entries, "worst": worst}


def _read(directory: Path, key: str) -> Tensor:
    with safe_open(directory / "model.safetensors", "pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor
