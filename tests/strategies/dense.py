"""Direct dense transcriptions of published formulas, in float64 numpy, for small matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def consensus(deltas: Matrix, weights: Sequence[float], threshold: float, agreement: int) -> Matrix:
    """TALL masks (Wang et al. 2024, arXiv:2405.07813): m_t = |τ_t| > λ·|τ_MTL − τ_t|; Σ m_t ≥ k keeps an entry."""
    merged = np.zeros(deltas.shape[1:])
    for place in np.ndindex(merged.shape):
        own = [w * delta[place] for w, delta in zip(weights, deltas, strict=True)]
        votes = sum(abs(x) > threshold * abs(sum(own) - x) for x in own)
        merged[place] = sum(own) if votes >= min(agreement, len(own)) else 0.0
    return merged


def _clamped(row: Matrix, low: float, high: float) -> Matrix:
    ordered = np.sort(row)
    return np.clip(row, ordered[int(row.size * low)], ordered[max(int(row.size * (1 - high) - 1), 0)])


def _min_max(row: Matrix) -> Matrix:
    spread = row.max() - row.min()
    return (row - row.min()) / spread if spread else np.zeros_like(row)


def pcb(rows: Matrix, weights: Sequence[float], ratio: float, winsorize: float) -> Matrix:
    """PCB-Merging's code (Du et al. 2024, arXiv:2410.02396); flat rows; scores below zero are never kept."""
    total = rows.sum(axis=0)
    merged, shares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for weight, row in zip(weights, rows, strict=True):
        magnitudes = _clamped(np.abs(row), winsorize, winsorize)
        score = np.exp(len(rows) * _min_max(magnitudes) ** 2) * np.tanh(row * total)
        share = _min_max(kept := _clamped(np.maximum(score, 0), 1 - ratio, 0))
        if kept.max() == kept.min() > 0:  # the code has 0/0 here
            share = (score >= kept.max()).astype(float)
        merged += weight * np.sign(row) * magnitudes * share
        shares += share
    return np.divide(merged, shares, out=np.zeros_like(merged), where=shares > 0)


def della_probabilities(delta: Matrix, density: float, epsilon: float) -> Matrix:
    """MagPrune (Deep et al. 2024, arXiv:2406.11617): density − ε for the smallest of a row up to density + ε."""
    ranks = np.abs(delta).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[1] - 1)


def breadcrumbs(delta: Matrix, density: float, gamma: float) -> Matrix:
    """mergekit's mask: of n entries the int(γn) largest go, then the smallest until int(density·n) are left."""
    flat = delta.flatten()
    kept = max(1, int(density * flat.size))
    top = min(int(gamma * flat.size), flat.size - kept)
    order = np.abs(flat).argsort()
    masked = np.zeros_like(flat)
    chosen = order[flat.size - kept - top : flat.size - top]
    masked[chosen] = flat[chosen]
    return masked.reshape(delta.shape)


def tucker_bases(scaled: Matrix, rank: int, rounds: int = 1000) -> tuple[Matrix, Matrix]:
    """HOSVD, then alternations until nothing changes, on dense matrices."""
    v = np.linalg.svd(np.concatenate(list(scaled)))[2][:rank].T
    captured = 0.0
    for _ in range(rounds):
        u = np.linalg.svd(np.concatenate([d @ v for d in scaled], axis=1))[0][:, :rank]
        v = np.linalg.svd(np.concatenate([d.T @ u for d in scaled], axis=1))[0][:, :rank]
        previous, captured = captured, sum(float(((u.T @ d @ v) ** 2).sum()) for d in scaled)
        if captured - previous <= 1e-14 * captured:
            break
    return u, v


def tucker(deltas: Matrix, rank: int, balance: float) -> Matrix:
    """Compress-then-Merge with a plain sum (He et al. 2026, arXiv:2606.03723): U Uᵀ ΣD_t V Vᵀ."""
    norms = np.sqrt((deltas**2).sum(axis=(1, 2)))
    scaled = deltas * ((balance * norms + (1 - balance) * norms.mean()) / norms)[:, None, None]
    u, v = tucker_bases(scaled, rank)
    merged: Matrix = u @ u.T @ deltas.sum(axis=0) @ v @ v.T
    return merged


def drm(deltas: Matrix, weights: Sequence[float], density: float) -> Matrix:
    """DRM-H (arXiv:2505.23117) with the cut, the trim and the disjoint mean of the authors' code."""
    u, s, vh = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    kept = s > 1e-2 * s.max()
    tasks = np.array(np.split(vh[kept], len(deltas), axis=1))
    norms = np.linalg.norm(tasks, axis=2, keepdims=True)
    unit = tasks / norms
    rank = unit.size - round(unit.size * density)
    threshold = np.sort(np.abs(unit), axis=None)[rank - 1] if rank and density < 1 else 0.0
    parts = np.where(np.abs(unit) >= threshold, unit, 0) * norms * s[kept][None, :, None]
    agreeing = np.where(np.sign(parts) == np.sign(parts.sum(axis=0)), parts, 0)
    total = np.einsum("t,tij->ij", np.asarray(weights), agreeing)
    merged: Matrix = u[:, kept] @ (total / np.maximum(1, (agreeing != 0).sum(axis=0)))
    return merged
