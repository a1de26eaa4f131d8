"""TIES: trim, elect signs, merge what agrees. With its space fixed it is KnOTS-TIES or Core-Space TIES."""

from __future__ import annotations

from mergekit_lowrank.strategies.base import Preset
from mergekit_lowrank.strategies.sparse import ElectedStrategy, ElectionParams, SparseSum
from mergekit_lowrank.strategies.sparsify import MagnitudeParams, MagnitudeTrim
from mergekit_lowrank.strategies.sums import SumParams

__all__ = ["PRESETS", "MagnitudePrune", "Ties"]


class TiesParams(ElectionParams, MagnitudeParams):
    """Parameters of ``ties``."""


class Ties(ElectedStrategy):
    """Trim each input to its largest entries, elect a sign for each entry, average the entries that agree."""

    name = "ties"
    summary = "trims each input, elects a sign for each entry, averages the entries that agree with it"
    paper = "TIES-Merging (Yadav et al. 2023, arXiv:2306.01708)"
    sparsifier = MagnitudeTrim
    Params = TiesParams


class MagnitudePruneParams(SumParams, MagnitudeParams):
    """Parameters of ``magnitude_prune``."""


class MagnitudePrune(SparseSum):
    """Trim each input to its largest entries, and add up what is left."""

    name = "magnitude_prune"
    summary = "trims each input to its largest entries, then adds them up"
    paper = "the trim of TIES-Merging (arXiv:2306.01708) alone; peft's `magnitude_prune`"
    sparsifier = MagnitudeTrim
    Params = MagnitudePruneParams


PRESETS = (
    Preset(
        "knots",
        Ties,
        "TIES in the joint singular directions of all inputs, one threshold over the model (KnOTS-TIES)",
        "KnOTS (Stoica et al. 2024, arXiv:2410.19735)",
        space="joint",
        parameters={"scope": "model"},
    ),
    Preset(
        "core_ties",
        Ties,
        "TIES between the singular vectors of the stacked factors (Core Space)",
        "Core Space Merging (arXiv:2509.17786)",
        space="core",
        parameters={"density": 0.1},
    ),
    Preset(
        "ctm",
        Ties,
        "TIES in two bases as small as the result, shared by all inputs (Compress-then-Merge)",
        "Compress-then-Merge (He et al. 2026, arXiv:2606.03723)",
        space="tucker",
        parameters={"density": 0.25},
    ),
)
