"""How often the entries of several updates stand against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.decompositions import in_double
from mergekit_lowrank.lowrank.updates import InputUpdate, LowRankUpdate, are_low_rank

__all__ = ["SignConflict", "independent_conflict", "sign_conflict"]

EXACT_ENTRIES = 1 << 14
"""Modules of up to this many entries are looked at whole: a few copies of them are small beside any merge."""
GROUPS = 64
"""Of larger modules 4,096 entries are looked at, in this many groups: a share is known within 0.01 or so."""
LOW_RANK_GROUP = (8, 8)
"""Random rows and columns of a group: their entries come from 512 rows of the factors."""
DENSE_GROUP = (1, 64)
"""The same where an update is dense, so that few of its rows are read."""


@dataclass(frozen=True, eq=False)
class SignConflict:
    """Opposed signs among the entries of n updates of one module.

    Attributes:
        pairs: (n, n) float64: of the entries in which neither is zero the share in which their signs differ; 0.5 is
            what unrelated updates have. Not-a-number where there is no such entry.
        opposed: Σ min(p, q) / Σ (p + q) over entries, p and q the sums of the positive and of the negative w·ΔW: the
            share of all that is added which stands against the sign that wins, in [0, 0.5]. None where all is zero.
        standard_error: of ``opposed``.
        pair_error: the largest standard error in ``pairs``.
        is_exact: whether all entries were looked at; the errors are zero then.

    Source: the signs that TIES elects (arXiv:2306.01708, section 3), of which ``opposed`` is the mass that loses.
    """

    pairs: Tensor
    opposed: float | None
    standard_error: float
    pair_error: float
    is_exact: bool


def sign_conflict(updates: Sequence[InputUpdate], weights: Sequence[float], generator: torch.Generator) -> SignConflict:
    """Opposed signs of the entries of n updates, all of them or 4,096 in 64 random groups.

    Args:
        updates: ΔW_t of one module.
        weights: w_t, for ``opposed``; they change nothing of ``pairs``.
        generator: on the CPU; draws rows and columns.
    """
    d_out, d_in = updates[0].shape
    is_exact = d_out * d_in <= EXACT_ENTRIES
    entries = _all(updates) if is_exact else _sampled(updates, generator)
    signs = entries.sign()
    both = torch.einsum("tme,sme->tsm", signs.abs(), signs.abs())
    differing = (both - torch.einsum("tme,sme->tsm", signs, signs)) / 2
    pairs, pair_errors = _ratio(differing, both)
    weighted = entries * entries.new_tensor(weights).view(-1, 1, 1)
    mass, total = weighted.abs().sum(dim=0), weighted.sum(dim=0)
    opposed, error = _ratio(((mass - total.abs()) / 2).sum(dim=1), mass.sum(dim=1))
    return SignConflict(
        pairs=pairs,
        opposed=None if opposed.isnan() else float(opposed),
        standard_error=0.0 if is_exact else float(error.nan_to_num()),
        pair_error=0.0 if is_exact else float(pair_errors.nan_to_num().max()),
        is_exact=is_exact,
    )


def independent_conflict(norms: Sequence[float]) -> float | None:
    """What ``opposed`` would be of independent updates with these weighted norms; None of fewer than two, and of zeros.

    Entries are taken as normal. Then E|Σx| = √(Σσ²)·√(2/π) and E Σ|x| = Σσ·√(2/π), and half of what is between them
    stands against the sum.
    """
    total = math.fsum(norms)
    return (1 - math.hypot(*norms) / total) / 2 if total and len(norms) > 1 else None


def _all(updates: Sequence[InputUpdate]) -> Tensor:
    """(n, d_out, d_in) float64, on the CPU."""
    return torch.stack([in_double(update.rows(slice(0, update.shape[0]))).cpu() for update in updates])


def _sampled(updates: Sequence[InputUpdate], generator: torch.Generator) -> Tensor:
    """(n, groups, entries) float64, on the CPU: the same entries of each update."""
    d_out, d_in = updates[0].shape
    row_count, column_count = LOW_RANK_GROUP if are_low_rank(updates) else DENSE_GROUP
    rows = torch.randint(d_out, (GROUPS, row_count), generator=generator)
    columns = torch.randint(d_in, (GROUPS, column_count), generator=generator)
    return torch.stack([_entries(update, rows, columns).double().cpu().flatten(1) for update in updates])


def _entries(update: InputUpdate, rows: Tensor, columns: Tensor) -> Tensor:
    """(g, p, q): in each of g groups the entries at rows (g, p) and columns (g, q)."""
    if isinstance(update, LowRankUpdate):
        b = update.b[rows.to(update.b.device)]  # (g, p, r)
        a = update.a[:, columns.to(update.a.device)]  # (r, g, q)
        return b @ a.transpose(0, 1) * update.scaling
    read = {row: update.rows(slice(row, row + 1))[0].cpu() for row in sorted(set(rows.flatten().tolist()))}
    own = torch.stack([torch.stack([read[row] for row in group]) for group in rows.tolist()])
    return own.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))


def _ratio(parts: Tensor, wholes: Tensor) -> tuple[Tensor, Tensor]:
    """Σ parts / Σ wholes over m groups (…, m), and its standard error as groups were drawn at random.

    Source: the ratio estimator; Cochran 1977, Sampling Techniques, section 6.4.
    """
    whole = wholes.sum(dim=-1)
    ratio = parts.sum(dim=-1) / whole
    m = parts.shape[-1]
    deviations = parts - ratio.unsqueeze(-1) * wholes
    return ratio, deviations.square().sum(dim=-1).mul(m / max(m - 1, 1)).sqrt() / whole
