"""Model Breadcrumbs: remove the largest and the smallest entries; then add up or elect."""

from __future__ import annotations

from mergekit_lowrank.strategies.sparse import ElectedStrategy, ElectionParams, SparseSum
from mergekit_lowrank.strategies.sparsify import OutlierParams, OutlierTrim
from mergekit_lowrank.strategies.sums import SumParams

__all__ = ["Breadcrumbs", "BreadcrumbsTies"]

PAPER = "Model Breadcrumbs (Davari & Belilovsky 2023, arXiv:2312.06795)"


class BreadcrumbsParams(SumParams, OutlierParams):
    """Parameters of ``breadcrumbs``."""


class Breadcrumbs(SparseSum):
    """Remove the largest and the smallest entries of each input, and add up."""

    name = "breadcrumbs"
    summary = "removes the largest and the smallest entries, adds up the others"
    paper = PAPER
    sparsifier = OutlierTrim
    Params = BreadcrumbsParams


class BreadcrumbsTiesParams(ElectionParams, OutlierParams):
    """Parameters of ``breadcrumbs_ties``."""


class BreadcrumbsTies(ElectedStrategy):
    """Remove the largest and the smallest entries of each input, then elect and average as TIES does."""

    name = "breadcrumbs_ties"
    summary = "removes the largest and the smallest entries, then elects signs and averages as TIES does"
    paper = PAPER
    sparsifier = OutlierTrim
    Params = BreadcrumbsTiesParams
