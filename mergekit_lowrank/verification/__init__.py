"""Proof of an output: hashes, structure, and the same merge made again."""

from mergekit_lowrank.verification.results import Fault, ModuleCheck, Verification
from mergekit_lowrank.verification.verifying import Means, verification_of

__all__ = ["Fault", "Means", "ModuleCheck", "Verification", "verification_of"]
