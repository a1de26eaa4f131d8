"""Pure low-rank algebra on tensors: no files, no recipes, no strategies."""

from mergekit_lowrank.lowrank.comparison import Comparison, compare, cosines_of
from mergekit_lowrank.lowrank.conflict import SignConflict, independent_conflict, sign_conflict
from mergekit_lowrank.lowrank.decompositions import (
    JointDecomposition,
    fix_signs,
    in_double,
    joint_decomposition,
    left_singular_basis,
    polar_factor,
    svd,
)
from mergekit_lowrank.lowrank.dense_joint import DenseJointDecomposition, dense_joint_decomposition
from mergekit_lowrank.lowrank.products import (
    distance,
    inner,
    inner_products,
    norm,
    overlaps,
    overlaps_and_energies,
)
from mergekit_lowrank.lowrank.scratch import empty, scratch_space
from mergekit_lowrank.lowrank.selection import RadixSelection, kth_magnitudes, order_statistics
from mergekit_lowrank.lowrank.structured import hadamard, kronecker, tucker
from mergekit_lowrank.lowrank.truncation import Spectrum, Truncation, canonical, factorise, singular_values, spectrum_of
from mergekit_lowrank.lowrank.updates import (
    DenseUpdate,
    InputUpdate,
    LowRankUpdate,
    StreamedUpdate,
    Update,
    are_low_rank,
    blocks_of_rows,
    concatenate,
    converted,
    densify,
    low_rank,
    padded_stacks,
)

__all__ = [
    "Comparison",
    "DenseJointDecomposition",
    "DenseUpdate",
    "InputUpdate",
    "JointDecomposition",
    "LowRankUpdate",
    "RadixSelection",
    "SignConflict",
    "Spectrum",
    "StreamedUpdate",
    "Truncation",
    "Update",
    "are_low_rank",
    "blocks_of_rows",
    "canonical",
    "compare",
    "concatenate",
    "converted",
    "cosines_of",
    "dense_joint_decomposition",
    "densify",
    "distance",
    "empty",
    "factorise",
    "fix_signs",
    "hadamard",
    "in_double",
    "independent_conflict",
    "inner",
    "inner_products",
    "joint_decomposition",
    "kronecker",
    "kth_magnitudes",
    "left_singular_basis",
    "low_rank",
    "norm",
    "order_statistics",
    "overlaps",
    "overlaps_and_energies",
    "padded_stacks",
    "polar_factor",
    "scratch_space",
    "sign_conflict",
    "singular_values",
    "spectrum_of",
    "svd",
    "tucker",
]
