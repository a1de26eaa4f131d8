"""The steps that element-wise methods are made of: pure functions of stacked entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "disjoint_max",
    "disjoint_mean",
    "drop_and_rescale",
    "elect_sign",
    "keep_agreeing",
    "magnitude_ranks",
    "nonzeros",
    "trim_by_magnitude",
    "trim_outliers",
    "weighted_sum",
    "zeros",
]

# Which operators these are made of decides their speed: a comparison that gives numbers, hardshrink and a product of
# matrices run at the pace of memory; booleans, torch.where and reductions over the inputs take up to ten times as long.


def weighted_sum(values: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_t c_t x_t.

    Args:
        values: (n, …).
        coefficients: n numbers, in any shape.
    """
    rows = coefficients.reshape(1, -1)
    return (rows @ values.reshape(rows.shape[1], -1)).view(values.shape[1:])


def nonzeros(values: Tensor, *, out: Tensor | None = None) -> Tensor:
    """1 where an entry is not zero, else 0, in the type of the entries."""
    return torch.ne(values, 0, out=torch.empty_like(values) if out is None else out)


def zeros(values: Tensor) -> Tensor:
    """1 where an entry is zero, else 0, in the type of the entries."""
    return torch.eq(values, 0, out=torch.empty_like(values))


def trim_by_magnitude(values: Tensor, thresholds: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """The entries with |x| ≥ threshold, the others zero. Every entry that equals the threshold stays.

    Args:
        values: (n, …).
        thresholds: one for each input; 0 keeps all.
        out: what to write to, perhaps ``values`` itself.
    """
    kept = torch.empty_like(values) if out is None else out
    for x, threshold, target in zip(values, thresholds, kept, strict=True):
        torch.hardshrink(x, _below(threshold, x.dtype), out=target)
    return kept


def trim_outliers(values: Tensor, thresholds: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """The entries with |x| ≤ threshold, the others zero. Every entry that equals the threshold stays.

    Args:
        values: (n, …).
        thresholds: one for each input.
        out: what to write to, perhaps ``values`` itself.
    """
    kept = torch.empty_like(values) if out is None else out
    for x, threshold, target in zip(values, thresholds, kept, strict=True):
        torch.sub(x, torch.hardshrink(x, threshold), out=target)
    return kept


def _below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of this type below the threshold."""
    number = np.float32 if dtype == torch.float32 else np.float64
    return float(np.nextafter(number(threshold), number(-np.inf)))


def magnitude_ranks(values: Tensor, dim: int) -> Tensor:
    """Where each entry stands among the magnitudes along ``dim``: 0 the smallest, 1 the largest, in equal steps.

    Zeros are not ranked and give 0; a single entry gives ½; of entries that tie the first ranks lowest.
    """
    magnitudes = values.abs().movedim(dim, -1).contiguous()
    count = magnitudes.shape[-1]
    steps = torch.arange(count, dtype=values.dtype, device=values.device).expand_as(magnitudes)
    silent = zeros(magnitudes).sum(dim=-1, keepdim=True)
    ranks = magnitudes.scatter_(-1, _ascending(magnitudes), steps)
    last = count - 1 - silent
    ranks.sub_(silent).clamp_(min=0).div_(last.clamp(min=1))
    if bool((last <= 0).any()):
        ranks.masked_fill_(last <= 0, 0.5)
    return ranks.movedim(-1, dim)


def _ascending(magnitudes: Tensor) -> Tensor:
    """The order of non-negative numbers along the last dimension; of equal ones the first comes first."""
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=-1, stable=True)
    # Bit patterns order as the numbers do: pattern and place in one integer sort five times as fast as argsort.
    keys = magnitudes.view(torch.int32).numpy().astype(np.int64)
    keys <<= 32
    keys |= np.arange(magnitudes.shape[-1])
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)


def drop_and_rescale(values: Tensor, probabilities: Tensor, uniform: Tensor, *, rescale: bool = True) -> Tensor:
    """The entries whose random number lies below their probability of being kept, over that probability.

    Args:
        values: (n, …).
        probabilities: of the same shape, or one that expands to it; 0 drops, 1 keeps.
        uniform: random numbers in [0, 1), of the shape of ``values``.
        rescale: whether to divide by the probability, so that the expectation of an entry stays what it was.

    Source: DARE (Yu et al. 2023, arXiv:2311.03099), section 3.2.
    """
    kept = torch.lt(uniform, probabilities, out=torch.empty_like(values)).mul_(values)
    return kept.div_(zeros(probabilities).add_(probabilities)) if rescale else kept


def elect_sign(values: Tensor, method: Literal["total", "frequency"] = "total") -> Tensor:
    """The sign of each entry on which the inputs agree most: of Σ x (``total``) or of Σ sign x (``frequency``).

    Args:
        values: (n, …), already trimmed; zero means "does not vote".
        method: what is summed.

    Returns:
        (…), entries in {-1, 0, +1}; 0 where the votes cancel exactly or nobody votes.

    Source: TIES-Merging (Yadav et al. 2023, arXiv:2306.01708), section 3, elect; peft names the methods.
    """
    votes = values if method == "total" else values.sign()
    return weighted_sum(votes, votes.new_ones(len(votes))).sign_()


def keep_agreeing(values: Tensor, sign: Tensor) -> Tensor:
    """The entries whose sign is the elected one, the others zero; all zero where the elected sign is 0.

    Args:
        values: (n, …).
        sign: (…), or (n, …) where inputs are held against signs of their own; entries in {-1, 0, +1}.
    """
    return (values * sign).relu_().mul_(sign)


def disjoint_mean(values: Tensor, weights: Tensor, divisor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Σ_t w_t x_t over a divisor that counts kept entries only; undivided where the divisor is zero.

    Args:
        values: (n, …), trimmed and agreeing; zero means "not kept".
        weights: (n, 1, …), what each input is multiplied by.
        divisor: (n, 1, …), what each kept entry adds to the divisor: 1 for a mean, its weight for a weighted mean.
        out: memory to work in, perhaps ``values`` itself.

    Source: TIES-Merging (arXiv:2306.01708), section 3, disjoint merge.
    """
    total = weighted_sum(values, weights)
    count = weighted_sum(nonzeros(values, out=out), divisor)
    return total.div_(count.add_(zeros(count)))


def disjoint_max(contributions: Tensor) -> Tensor:
    """The contribution of largest magnitude at each entry, with its sign; the positive one of two that tie.

    Args:
        contributions: (n, …), weight times entry, trimmed and agreeing; zero means "not kept".

    Source: TIES-Merging's code, ``disjoint_merge`` with ``max``.
    """
    highest, lowest = contributions.amax(dim=0), contributions.amin(dim=0)
    return torch.where(highest >= -lowest, highest, lowest)
