"""Pure low-rank algebra on tensors: no files, no recipes, no strategies."""

from mergekit_lowrank.lowrank.comparison import Comparison, compare
from mergekit_lowrank.lowrank.decompositions import (
    JointDecomposition,
    fix_signs,
    in_double,
    joint_decomposition,
    left_singular_basis,
    polar_factor,
    svd,
)
from mergekit_lowrank.lowrank.products import distance, inner, inner_products, norm, overlaps
from mergekit_lowrank.lowrank.selection import RadixSelection, kth_magnitude, kth_magnitudes, order_statistics
from mergekit_lowrank.lowrank.truncation import Spectrum, Truncation, canonical, factorise, spectrum_of
from mergekit_lowrank.lowrank.updates import (
    DenseUpdate,
    LowRankUpdate,
    Update,
    concatenate,
    converted,
    densify,
    padded_stacks,
)

__all__ = [
    "Comparison",
    "DenseUpdate",
    "JointDecomposition",
    "LowRankUpdate",
    "RadixSelection",
    "Spectrum",
    "Truncation",
    "Update",
    "canonical",
    "compare",
    "concatenate",
    "converted",
    "densify",
    "distance",
    "factorise",
    "fix_signs",
    "in_double",
    "inner",
    "inner_products",
    "joint_decomposition",
    "kth_magnitude",
    "kth_magnitudes",
    "left_singular_basis",
    "norm",
    "order_statistics",
    "overlaps",
    "padded_stacks",
    "polar_factor",
    "spectrum_of",
    "svd",
]
