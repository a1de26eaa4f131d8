"""Spaces: where a strategy works. ``Space`` is the extension point, the built-ins are below it."""

from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space, SpaceParams
from mergekit_lowrank.spaces.core import CoreCoordinates, CoreSpace
from mergekit_lowrank.spaces.delta import DeltaCoordinates, DeltaSpace
from mergekit_lowrank.spaces.factors import FactorCoordinates, FactorSpace
from mergekit_lowrank.spaces.joint import JointCoordinates, JointParams, JointSpace
from mergekit_lowrank.spaces.tucker import TuckerCoordinates, TuckerParams, TuckerSpace

__all__ = [
    "BLOCK_ENTRIES",
    "Coordinates",
    "CoreCoordinates",
    "CoreSpace",
    "DeltaCoordinates",
    "DeltaSpace",
    "FactorCoordinates",
    "FactorSpace",
    "JointCoordinates",
    "JointParams",
    "JointSpace",
    "ModuleShape",
    "Part",
    "Space",
    "SpaceParams",
    "TuckerCoordinates",
    "TuckerParams",
    "TuckerSpace",
]
