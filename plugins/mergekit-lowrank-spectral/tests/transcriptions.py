"""The methods' formulas on dense matrices, as their pages state them: what the factor forms must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def svd(matrix: Matrix, floor: float = 0.0) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > floor
    return u[:, kept], s[kept], vh[kept]


def polar(matrix: Matrix, tolerance: float) -> Matrix:
    if not matrix.size:
        return matrix
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > tolerance * s[0]
    return u[:, kept] @ vh[kept]


def tsv(deltas: Sequence[Matrix], directions: int, share: float | None, tolerance: float) -> Matrix:
    kept = max(1, int(directions * (share or 1 / len(deltas))))
    parts = [tuple(svd(d, tolerance * np.linalg.norm(d))) for d in deltas]
    left = polar(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1), tolerance)
    right = polar(np.concatenate([vh[:kept] for _, _, vh in parts]), tolerance)
    return left @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ right


def iso_c(deltas: Sequence[Matrix], tolerance: float) -> Matrix:
    u, s, vh = svd(sum(deltas), tolerance * sum(np.linalg.norm(d) for d in deltas))
    return u @ vh * (s.mean() if s.size else 0.0)


def iso_cts(deltas: Sequence[Matrix], directions: int, fraction: float, tolerance: float) -> Matrix:
    own = round((directions - int(directions * fraction)) / len(deltas))
    common = max(0, directions - own * len(deltas))
    u, s, vh = svd(sum(deltas), tolerance * sum(np.linalg.norm(d) for d in deltas))
    u, s, vh = u[:, :common], s[:common], vh[:common]
    lefts, values, rights = [], [], []
    for d in deltas:
        left, value, right = svd(d - u @ u.T @ d, tolerance * np.linalg.norm(d))
        lefts, values, rights = [*lefts, left[:, :own]], [*values, value[:own]], [*rights, right[:own]]
    whole = np.concatenate([*values, s])
    left, right = np.concatenate([*lefts, u], axis=1), np.concatenate([*rights, vh])
    return polar(left, tolerance) @ polar(right, tolerance) * (whole.mean() if whole.size else 0.0)


def truncated(matrix: Matrix, rank: int) -> Matrix:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def cart(deltas: Sequence[Matrix], weights: Sequence[float], directions: int, fraction: float, factor: float) -> Matrix:
    centre = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    kept = math.ceil(fraction * directions)
    departures = (w * truncated(d - centre, kept) for w, d in zip(weights, deltas, strict=True))
    return centre + factor * sum(departures)


def star(deltas: Sequence[Matrix], weights: Sequence[float], share: float) -> Matrix:
    total = np.zeros_like(deltas[0])
    for w, d in zip(weights, deltas, strict=True):
        s = np.linalg.svd(d, compute_uv=False)
        rank = next(k for k in range(1, s.size + 1) if s[:k].sum() >= share * s.sum() * (1 - 1e-12))
        total += w * truncated(d, rank) * (s.sum() / s[:rank].sum())
    return total / sum(weights)


def k_means(points: Matrix, clusters: int, iterations: int) -> list[list[int]]:
    """The members of each cluster: greedy seeds, then Lloyd's rounds until nothing moves."""

    def cost(seeds: list[int]) -> float:
        return sum(min(float(((p - points[c]) ** 2).sum()) for c in seeds) for p in points)

    seeds: list[int] = []
    while len(seeds) < clusters and (not seeds or cost(seeds) > 1e-12):
        seeds.append(min(range(len(points)), key=lambda i: cost([*seeds, i])))
    centres = points[seeds]
    for _ in range(iterations + 1):
        nearest = [int(((p - centres) ** 2).sum(axis=1).argmin()) for p in points]
        members = [[i for i, n in enumerate(nearest) if n == c] for c in range(len(centres))]
        members = [m for m in members if m]
        centres = np.array([points[m].mean(axis=0) for m in members])
    return members


def lora_lego(
    units: Sequence[Matrix], d_in: int, clusters: int, *, norm: float | None = np.inf, iterations: int = 300
) -> Matrix:
    """Of units (r_t, d_in + d_out), one array for each input; without output reweighting."""
    points = np.concatenate(units)
    merged = np.zeros((points.shape[1] - d_in, d_in))
    for members in k_means(points, clusters, iterations):
        mean = points[members].mean(axis=0)
        if norm is not None:
            mean = mean * np.linalg.norm(points[members], ord=norm, axis=1).mean() / np.linalg.norm(mean, ord=norm)
        merged += np.outer(mean[d_in:], mean[:d_in])
    return merged
