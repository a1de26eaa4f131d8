"""Scale and rank policies: how large the merged update is made, and how it becomes an adapter of some rank."""

from mergekit_lowrank.policies.budget import Offer, least_rank, spread
from mergekit_lowrank.policies.rank import (
    VLLM_RANKS,
    BudgetRank,
    Compressed,
    EnergyRank,
    ErrorRank,
    FixedRank,
    RankPolicy,
    WholeRank,
    snapped,
)
from mergekit_lowrank.policies.scale import AutoScale, FixedScale, RetentionScale, ScalePolicy, Scaling, retained

__all__ = [
    "VLLM_RANKS",
    "AutoScale",
    "BudgetRank",
    "Compressed",
    "EnergyRank",
    "ErrorRank",
    "FixedRank",
    "FixedScale",
    "Offer",
    "RankPolicy",
    "RetentionScale",
    "ScalePolicy",
    "Scaling",
    "WholeRank",
    "least_rank",
    "retained",
    "snapped",
    "spread",
]
