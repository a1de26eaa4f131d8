"""Pure low-rank algebra on tensors: no files, no recipes, no strategies."""

from mergekit_lowrank.lowrank.updates import DenseUpdate, LowRankUpdate, Update, concatenate, densify

__all__ = ["DenseUpdate", "LowRankUpdate", "Update", "concatenate", "densify"]
