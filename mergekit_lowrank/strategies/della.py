"""DELLA: drop entries at random, the small ones of a row more often; then elect or add up."""

from __future__ import annotations

from mergekit_lowrank.strategies.sparse import ElectedStrategy, ElectionParams, SparseSum
from mergekit_lowrank.strategies.sparsify import RankedDrop, RankedDropParams
from mergekit_lowrank.strategies.sums import SumParams

__all__ = ["Della", "DellaLinear"]

PAPER = "DELLA-Merging (Deep et al. 2024, arXiv:2406.11617)"


class DellaLinearParams(SumParams, RankedDropParams):
    """Parameters of ``della_linear``."""


class DellaLinear(SparseSum):
    """Drop entries of each input at random, small ones of a row more often, rescale what is left, and add up."""

    name = "della_linear"
    summary = "drops small entries of a row more often than large ones, rescales the others, adds them up"
    paper = PAPER
    sparsifier = RankedDrop
    Params = DellaLinearParams
    is_random = True


class DellaParams(ElectionParams, RankedDropParams):
    """Parameters of ``della``."""


class Della(ElectedStrategy):
    """Drop entries of each input at random, small ones of a row more often, and rescale; then elect as TIES does."""

    name = "della"
    summary = "drops small entries of a row more often than large ones, rescales, then elects signs and averages"
    paper = PAPER
    sparsifier = RankedDrop
    Params = DellaParams
    is_random = True
