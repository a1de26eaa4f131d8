"""Strategies: the merge methods. ``Strategy`` is the extension point; one short file a family."""

from mergekit_lowrank.strategies.base import (
    ElementwiseStrategy,
    MergeContext,
    Params,
    Preset,
    Strategy,
    Survey,
    column,
    keyed_generator,
    per_input,
)
from mergekit_lowrank.strategies.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mergekit_lowrank.strategies.consensus import Consensus
from mergekit_lowrank.strategies.dare import DareLinear, DareTies
from mergekit_lowrank.strategies.della import Della, DellaLinear
from mergekit_lowrank.strategies.drm import Drm
from mergekit_lowrank.strategies.geometric import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp
from mergekit_lowrank.strategies.gram import GramParams, GramStrategy
from mergekit_lowrank.strategies.linear import PRESETS as LINEAR_PRESETS
from mergekit_lowrank.strategies.linear import Linear
from mergekit_lowrank.strategies.pcb import Pcb
from mergekit_lowrank.strategies.robustmerge import RobustMerge
from mergekit_lowrank.strategies.sce import Sce
from mergekit_lowrank.strategies.ties import PRESETS as TIES_PRESETS
from mergekit_lowrank.strategies.ties import MagnitudePrune, Ties

BUILT_IN_METHODS: tuple[type[Strategy] | Preset, ...] = (
    RobustMerge,
    Drm,
    Linear,
    *LINEAR_PRESETS,
    Slerp,
    NuSlerp,
    MultiSlerp,
    Karcher,
    ModelStock,
    Ties,
    *TIES_PRESETS,
    MagnitudePrune,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    Breadcrumbs,
    BreadcrumbsTies,
    Sce,
    Consensus,
    Pcb,
)
"""All merge methods of this package, one line each; what a new one must be added to."""

__all__ = [
    "BUILT_IN_METHODS",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "Consensus",
    "DareLinear",
    "DareTies",
    "Della",
    "DellaLinear",
    "Drm",
    "ElementwiseStrategy",
    "GramParams",
    "GramStrategy",
    "Karcher",
    "Linear",
    "MagnitudePrune",
    "MergeContext",
    "ModelStock",
    "MultiSlerp",
    "NuSlerp",
    "Params",
    "Pcb",
    "Preset",
    "RobustMerge",
    "Sce",
    "Slerp",
    "Strategy",
    "Survey",
    "Ties",
    "column",
    "keyed_generator",
    "per_input",
]
