"""How far a stored update is from its recomputation, and how far rounding alone may take it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.lowrank import LowRankUpdate, distance, norm

__all__ = [
    "TOLERANCE",
    "Difference",
    "are_same_bits",
    "difference_of_factors",
    "difference_of_roundings",
    "half_gap",
    "least_change",
]

TOLERANCE = 1e-4
"""Of an update: two machines, or two versions of a library, round sums and decompositions differently."""


@dataclass(frozen=True)
class Difference:
    """An update beside its recomputation.

    Attributes:
        error: ‖found − expected‖_F / ‖expected‖_F; infinite where zero was expected, NaN where something is not finite.
        tolerance: what the error may be.
        is_identical: whether every bit is the same.
    """

    error: float
    tolerance: float
    is_identical: bool


def difference_of_factors(found: LowRankUpdate, expected: LowRankUpdate) -> Difference:
    """Two products of factors that were rounded once each.

    With u half the spacing of the stored type at 1, a factor B that was rounded to B̂ obeys |B − B̂| ≤ u |B|, entry by
    entry, and |B| ≤ |B̂| / (1 − u). So |B A − B̂ Â| ≤ (2u + u²) / (1 − u)² · |B̂| |Â|, and in norm rounding moves the
    product by at most that times ‖ |B̂| |Â| ‖_F. Both were moved so, and before they may differ by ``TOLERANCE``.

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 2.2 and 3.5.

    Args:
        found: as stored.
        expected: as it would be stored, in its type; padding does not matter.
    """
    rank = max(found.rank, expected.rank)
    is_identical = found.scaling == expected.scaling and all(
        are_same_bits(*(_padded(factor, rank, dim) for factor in pair))
        for dim, pair in enumerate(((found.a, expected.a), (found.b, expected.b)))
    )
    if is_identical:
        return Difference(0.0, TOLERANCE, is_identical=True)
    wide = [update.to("cpu", torch.float64) for update in (found, expected)]
    missed, wanted = distance(wide[0], [wide[1]], [1.0]), norm(wide[1])
    rounding = _growth(expected.dtype) * sum(_norm_of_magnitudes(own, expected.dtype) for own in wide)
    return Difference(_ratio(missed, wanted), TOLERANCE + (rounding / wanted if wanted else 0.0), is_identical=False)


def difference_of_roundings(pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Two matrices of one type, each a rounding of something: only what neither rounding explains is an error.

    Args:
        pairs: blocks found and expected, of the same rows; all of the rows together.
    """
    missed = wanted = 0.0
    is_identical = True
    for found, expected in pairs:
        if not are_same_bits(found, expected):
            is_identical = False
            slack = half_gap(found) + half_gap(expected)
            missed += float(least_change(found.double(), expected.double(), slack).square().sum())
        wanted += float(expected.double().square().sum())
    return Difference(_ratio(math.sqrt(missed), math.sqrt(wanted)), TOLERANCE, is_identical)


def least_change(found: Tensor, expected: Tensor, slack: Tensor) -> Tensor:
    """The distance of each entry from what it should be beyond ``slack``; NaN where only one of them is NaN."""
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    return (found - expected).abs_().sub_(slack).clamp_(min=0).masked_fill_(is_same, 0.0)


def half_gap(values: Tensor) -> Tensor:
    """Half the distance to the next number of the type, float64: rounding to nearest moves nothing further."""
    if not values.dtype.is_floating_point:
        return torch.full_like(values, 0.5, dtype=torch.float64)
    kind = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double()).exponent  # |value| is in [2^(exponent − 1), 2^exponent); 0 of zero
    spacing = torch.ldexp(torch.full_like(values, kind.eps / 2, dtype=torch.float64), exponent)
    return spacing.masked_fill_(values == 0, 0).clamp_(min=kind.tiny * kind.eps).div_(2)


def are_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether type, shape and every bit are the same, the sign of zeros too."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    return factor if not missing else pad(factor, (0, missing) if dim else (0, 0, 0, missing))


def _norm_of_magnitudes(update: LowRankUpdate, dtype: torch.dtype) -> float:
    """‖ |B| |A| ‖_F. What rounding to a type made subnormal or zero counts as its least normal number."""
    b, a = (factor.abs().clamp_(min=torch.finfo(dtype).tiny) for factor in (update.b, update.a))
    return norm(LowRankUpdate(b, a, abs(update.scaling)))


def _growth(dtype: torch.dtype) -> float:
    u = torch.finfo(dtype).eps / 2
    return (2 * u + u * u) / (1 - u) ** 2


def _ratio(missed: float, wanted: float) -> float:
    if wanted:
        return missed / wanted
    return math.inf if missed else missed
