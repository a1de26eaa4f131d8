"""How often the entries of several updates stand against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank.lowrank.decompositions import in_double
from mergekit_lowrank.lowrank.updates import InputUpdate, LowRankUpdate

__all__ = ["SignConflict", "sign_conflict"]

EXACT_ENTRIES = 1 << 14
"""Modules of up to this many entries are looked at whole: a few copies of them are small beside any merge."""
ROWS = 64
COLUMNS = 64
"""Of larger ones this many random columns in each of that many random rows: a share is known within 0.01 or so."""


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
    """Opposed signs of the entries of n updates, all of them or 64 random columns in each of 64 random rows.

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


def _all(updates: Sequence[InputUpdate]) -> Tensor:
    """(n, d_out, d_in) float64, on the CPU."""
    return torch.stack([in_double(update.rows(slice(0, update.shape[0]))).cpu() for update in updates])


def _sampled(updates: Sequence[InputUpdate], generator: torch.Generator) -> Tensor:
    """(n, rows, columns) float64, on the CPU: the same entries of each update."""
    d_out, d_in = updates[0].shape
    rows = torch.randperm(d_out, generator=generator)[:ROWS].sort().values
    columns = torch.randint(d_in, (len(rows), COLUMNS), generator=generator)
    return torch.stack([_entries(update, rows, columns) for update in updates])


def _entries(update: InputUpdate, rows: Tensor, columns: Tensor) -> Tensor:
    """(m, c) float64, on the CPU: the entries at rows (m,) and in each of them at columns (m, c)."""
    if isinstance(update, LowRankUpdate):
        b = in_double(update.b[rows.to(update.b.device)]).cpu()
        a = in_double(update.a[:, columns.flatten().to(update.a.device)]).cpu().unflatten(1, columns.shape)
        return torch.einsum("mr,rmc->mc", b, a) * update.scaling
    read = torch.cat([in_double(update.rows(slice(row, row + 1))).cpu() for row in rows.tolist()])
    return read.gather(1, columns)


def _ratio(parts: Tensor, wholes: Tensor) -> tuple[Tensor, Tensor]:
    """Σ parts / Σ wholes over the rows (…, m), and its standard error as rows were drawn at random.

    Source: the ratio estimator; Cochran 1977, Sampling Techniques, section 6.4.
    """
    whole = wholes.sum(dim=-1)
    ratio = parts.sum(dim=-1) / whole
    m = parts.shape[-1]
    deviations = parts - ratio.unsqueeze(-1) * wholes
    return ratio, deviations.square().sum(dim=-1).mul(m / max(m - 1, 1)).sqrt() / whole
