"""How the inputs of a recipe stand to each other, before they are merged."""

from mergekit_lowrank.diagnostics.diagnosing import diagnose
from mergekit_lowrank.diagnostics.diagnosis import (
    Diagnosis,
    Finding,
    InputDiagnosis,
    ModuleDiagnosis,
    PairDiagnosis,
    Unmeasured,
)
from mergekit_lowrank.diagnostics.findings import findings_of

__all__ = [
    "Diagnosis",
    "Finding",
    "InputDiagnosis",
    "ModuleDiagnosis",
    "PairDiagnosis",
    "Unmeasured",
    "diagnose",
    "findings_of",
]
