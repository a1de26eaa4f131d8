"""Strategies: the merge methods. ``Strategy`` is the extension point; one short file a family."""

from mergekit_lowrank.strategies.base import (
    ElementwiseStrategy,
    MergeContext,
    Params,
    Preset,
    Strategy,
    Survey,
    keyed_generator,
    per_input,
)
from mergekit_lowrank.strategies.drm import Drm
from mergekit_lowrank.strategies.linear import PRESETS as LINEAR_PRESETS
from mergekit_lowrank.strategies.linear import Linear
from mergekit_lowrank.strategies.robustmerge import RobustMerge
from mergekit_lowrank.strategies.ties import PRESETS as TIES_PRESETS
from mergekit_lowrank.strategies.ties import Ties

BUILT_IN_PRESETS = (*LINEAR_PRESETS, *TIES_PRESETS)

__all__ = [
    "BUILT_IN_PRESETS",
    "Drm",
    "ElementwiseStrategy",
    "Linear",
    "MergeContext",
    "Params",
    "Preset",
    "RobustMerge",
    "Strategy",
    "Survey",
    "Ties",
    "keyed_generator",
    "per_input",
]
