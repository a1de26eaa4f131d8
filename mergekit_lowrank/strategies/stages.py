"""The steps that element-wise methods are made of: pure functions of stacked entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

__all__ = ["disjoint_max", "disjoint_mean", "elect_sign", "has_cancelled_votes", "keep_agreeing", "trim_by_magnitude"]


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
