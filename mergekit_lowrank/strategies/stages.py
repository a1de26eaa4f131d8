"""The steps that element-wise methods are made of: pure functions of stacked entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

__all__ = [
    "disjoint_max",
    "disjoint_mean",
    "drop_and_rescale",
    "elect_sign",
    "has_cancelled_votes",
    "keep_agreeing",
    "magnitude_ranks",
    "trim_by_magnitude",
    "trim_outliers",
]


def trim_by_magnitude(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The entries with |x| ≥ threshold, the others zero. Every entry that equals the threshold stays.

    Args:
        values: (n, …).
        thresholds: one for each input; 0 keeps all.
    """
    # hardshrink zeroes |x| ≤ λ in one pass over memory; a comparison and a selection take ten times as long.
    if len(set(thresholds)) == 1:
        return hardshrink(values, _below(thresholds[0], values.dtype))
    return torch.stack([hardshrink(x, _below(t, x.dtype)) for x, t in zip(values, thresholds, strict=True)])


def _below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of this type below the threshold."""
    number = torch.tensor(threshold, dtype=dtype)
    return float(torch.nextafter(number, torch.tensor(-torch.inf, dtype=dtype)))


def trim_outliers(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The entries with |x| ≤ threshold, the others zero. Every entry that equals the threshold stays.

    Args:
        values: (n, …).
        thresholds: one for each input.
    """
    highest = torch.tensor(thresholds, dtype=values.dtype, device=values.device)
    return values * (values.abs() <= highest.view(-1, *[1] * (values.ndim - 1)))


def magnitude_ranks(values: Tensor, dim: int) -> Tensor:
    """Where each entry stands among the magnitudes along ``dim``: 0 the smallest, 1 the largest, in equal steps.

    Zeros are not ranked and give 0; a single entry gives ½; of entries that tie the first ranks lowest.
    """
    magnitudes = values.abs().movedim(dim, -1).contiguous()
    count = magnitudes.shape[-1]
    steps = torch.arange(count, dtype=values.dtype, device=values.device).expand_as(magnitudes)
    ranks = torch.empty_like(magnitudes).scatter_(-1, _ascending(magnitudes), steps)
    zeros = (magnitudes == 0).sum(dim=-1, keepdim=True)
    last = count - zeros - 1
    return torch.where(last > 0, (ranks - zeros).clamp_(min=0) / last.clamp(min=1), 0.5).movedim(-1, dim)


def _ascending(magnitudes: Tensor) -> Tensor:
    """The order of non-negative numbers along the last dimension; of equal ones the first comes first."""
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=-1, stable=True)
    # Bit patterns order as the numbers do: pattern and place in one integer sort five times as fast as argsort.
    places = torch.arange(magnitudes.shape[-1])
    keys = (magnitudes.view(torch.int32).long() << 32 | places).numpy()
    keys.sort(axis=-1)
    return torch.from_numpy(keys) & 0xFFFFFFFF


def drop_and_rescale(values: Tensor, probabilities: Tensor, uniform: Tensor, *, rescale: bool = True) -> Tensor:
    """The entries whose random number lies below their probability of being kept, over that probability.

    Args:
        values: (n, …).
        probabilities: of the same shape, or one that expands to it; 0 drops, 1 keeps.
        uniform: random numbers in [0, 1), of the shape of ``values``.
        rescale: whether to divide by the probability, so that the expectation of an entry stays what it was.

    Source: DARE (Yu et al. 2023, arXiv:2311.03099), section 3.2.
    """
    kept = values * (uniform < probabilities)
    return kept.div_(torch.where(probabilities > 0, probabilities, 1)) if rescale else kept


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
    return votes.sum(dim=0).sign()


def has_cancelled_votes(values: Tensor, sign: Tensor) -> bool:
    """Whether an entry that some input votes on has the elected sign 0: votes that cancel exactly.

    Args:
        values: (n, …), already trimmed.
        sign: (…), entries in {-1, 0, +1}.
    """
    return bool((values.abs().amax(dim=0) * (sign == 0)).any())


def keep_agreeing(values: Tensor, sign: Tensor) -> Tensor:
    """The entries whose sign is the elected one, the others zero; all zero where the elected sign is 0.

    Args:
        values: (n, …).
        sign: (…), or (n, …) where inputs are held against signs of their own; entries in {-1, 0, +1}.
    """
    return (values * sign).relu_().mul_(sign)


def disjoint_mean(values: Tensor, weights: Tensor, divisor: Tensor) -> Tensor:
    """Σ_t w_t x_t over a divisor that counts kept entries only; zero where the divisor is zero.

    Args:
        values: (n, …), trimmed and agreeing; zero means "not kept".
        weights: (n, 1, …), what each input is multiplied by.
        divisor: (n, 1, …), what each kept entry adds to the divisor: 1 for a mean, its weight for a weighted mean.

    Source: TIES-Merging (arXiv:2306.01708), section 3, disjoint merge.
    """
    total = (values * weights).sum(dim=0)
    count = values.sign().abs_().mul_(divisor).sum(dim=0)
    return total.div_(count.add_(count == 0))


def disjoint_max(contributions: Tensor) -> Tensor:
    """The contribution of largest magnitude at each entry, with its sign; the positive one of two that tie.

    Args:
        contributions: (n, …), weight times entry, trimmed and agreeing; zero means "not kept".

    Source: TIES-Merging's code, ``disjoint_merge`` with ``max``.
    """
    highest, lowest = contributions.amax(dim=0), contributions.amin(dim=0)
    return torch.where(highest >= -lowest, highest, lowest)
