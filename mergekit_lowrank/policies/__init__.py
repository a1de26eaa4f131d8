"""Scale and rank policies: how large the merged update is made, and how it becomes an adapter of some rank."""

from mergekit_lowrank.policies.rank import Compressed, EnergyRank, FixedRank, RankPolicy
from mergekit_lowrank.policies.scale import AutoScale, FixedScale, RetentionScale, ScalePolicy, Scaling, retention

__all__ = [
    "AutoScale",
    "Compressed",
    "EnergyRank",
    "FixedRank",
    "FixedScale",
    "RankPolicy",
    "RetentionScale",
    "ScalePolicy",
    "Scaling",
    "retention",
]
