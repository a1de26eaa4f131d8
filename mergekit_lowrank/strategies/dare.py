"""DARE: drop entries at random, and make up for them; then add up or elect."""

from __future__ import annotations

from mergekit_lowrank.strategies.sparse import ElectedStrategy, ElectionParams, SparseSum
from mergekit_lowrank.strategies.sparsify import DropParams, RandomDrop
from mergekit_lowrank.strategies.sums import SumParams

__all__ = ["DareLinear", "DareTies"]

PAPER = "DARE (Yu et al. 2023, arXiv:2311.03099)"


class DareLinearParams(SumParams, DropParams):
    """Parameters of ``dare_linear``."""


class DareLinear(SparseSum):
    """Drop entries of each input at random, rescale what is left, and add up."""

    name = "dare_linear"
    summary = "drops entries at random, rescales the others, adds them up"
    paper = PAPER
    sparsifier = RandomDrop
    Params = DareLinearParams
    is_random = True


class DareTiesParams(ElectionParams, DropParams):
    """Parameters of ``dare_ties``."""


class DareTies(ElectedStrategy):
    """Drop entries of each input at random, rescale what is left, then elect and average as TIES does."""

    name = "dare_ties"
    summary = "drops entries at random, rescales the others, then elects signs and averages as TIES does"
    paper = PAPER
    sparsifier = RandomDrop
    Params = DareTiesParams
    is_random = True
