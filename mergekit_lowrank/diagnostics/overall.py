"""Modules taken together: sums and means, weighted with the energy that is in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from mergekit_lowrank.diagnostics.diagnosis import (
    InputDiagnosis,
    Matrix,
    ModuleDiagnosis,
    PairDiagnosis,
    Unmeasured,
)
from mergekit_lowrank.formats import Checkpoint

__all__ = ["common_modules", "input_diagnoses", "mean", "pair_diagnosis", "unmeasured_of", "weighted_energy"]

DENSE = (
    "an input has no factors here (a full fine-tune, DoRA, a tensor saved whole): of it ranks, gaps, subspaces and "
    "direction robustness are not measured, and the sum of the inputs has no spectrum"
)
VALUES = "they hold parameters as they are, not updates (extras), so there is nothing to compare"

Weighted = tuple[float | None, float]
"""A number, or None, and its weight."""


def mean(numbers: Iterable[Weighted]) -> float | None:
    """The weighted mean of those that are known; None where all weights are zero."""
    known = [(number, weight) for number, weight in numbers if number is not None]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(number * weight for number, weight in known) / total if total else None


def weighted_energy(module: ModuleDiagnosis) -> float:
    """Σ‖w ΔW‖² of the participants."""
    return math.fsum((w * own) ** 2 for w, own in zip(module.weights, module.norms, strict=True))


def input_diagnoses(inputs: Sequence[Checkpoint], modules: Sequence[ModuleDiagnosis]) -> tuple[InputDiagnosis, ...]:
    """What there is to say of each input over all modules."""
    total = math.fsum(map(weighted_energy, modules))
    return tuple(_input(checkpoint, modules, total) for checkpoint in inputs)


def _input(checkpoint: Checkpoint, modules: Sequence[ModuleDiagnosis], total: float) -> InputDiagnosis:
    label = checkpoint.label
    own = [(module, module.participants.index(label)) for module in modules if label in module.participants]
    weights = [module.weights[t] for module, t in own]
    energies = [module.norms[t] ** 2 for module, t in own]
    weighted = math.fsum(w * w * energy for w, energy in zip(weights, energies, strict=True))

    def over(values: Callable[[ModuleDiagnosis], Sequence[float | None]]) -> float | None:
        return mean((values(module)[t], energy) for (module, t), energy in zip(own, energies, strict=True))

    log_gap = over(lambda module: [None if gap is None else math.log(gap) for gap in module.gaps])
    return InputDiagnosis(
        label=label,
        location=checkpoint.location,
        weights=(min(weights, default=0.0), max(weights, default=0.0)),
        modules=len(own),
        norm=math.sqrt(math.fsum(energies)),
        weighted_norm=math.sqrt(weighted),
        share=weighted / total if total else None,
        stable_rank=over(lambda module: module.stable_ranks),
        effective_rank=over(lambda module: module.effective_ranks),
        gap=None if log_gap is None else math.exp(log_gap),
        robustness_head=over(lambda module: module.robustness_head),
        robustness_tail=over(lambda module: module.robustness_tail),
    )


def pair_diagnosis(labels: Sequence[str], modules: Sequence[ModuleDiagnosis]) -> PairDiagnosis:
    """What there is to say of each pair of inputs over the modules that both have."""
    common = {(s, t): list(common_modules(s, t, modules)) for s in labels for t in labels}

    def over(values: Callable[[ModuleDiagnosis], Matrix]) -> Matrix:
        return tuple(tuple(_mean_of_pair(common[s, t], values) for t in labels) for s in labels)

    return PairDiagnosis(
        cosines=tuple(tuple(_cosine(common[s, t]) for t in labels) for s in labels),
        row_overlaps=over(lambda module: module.row_overlaps),
        column_overlaps=over(lambda module: module.column_overlaps),
        smallest_row_angles=over(lambda module: module.smallest_row_angles),
        smallest_column_angles=over(lambda module: module.smallest_column_angles),
        row_alignments=over(lambda module: module.row_alignments),
        column_alignments=over(lambda module: module.column_alignments),
        sign_conflicts=over(lambda module: module.sign_conflicts),
    )


def common_modules(s: str, t: str, modules: Sequence[ModuleDiagnosis]) -> Iterator[tuple[ModuleDiagnosis, int, int]]:
    """The modules that both have, with their places among the participants."""
    for module in modules:
        if s in module.participants and t in module.participants:
            yield module, module.participants.index(s), module.participants.index(t)


def _mean_of_pair(
    common: Sequence[tuple[ModuleDiagnosis, int, int]], values: Callable[[ModuleDiagnosis], Matrix]
) -> float | None:
    return mean((values(module)[i][j], module.norms[i] * module.norms[j]) for module, i, j in common)


def _cosine(common: Sequence[tuple[ModuleDiagnosis, int, int]]) -> float | None:
    """Of both inputs' modules, each taken as one long vector."""
    lengths = [math.hypot(*(module.norms[own[k]] for module, *own in common)) for k in (0, 1)]
    if not all(lengths):
        return None
    product = math.fsum((module.cosines[i][j] or 0.0) * module.norms[i] * module.norms[j] for module, i, j in common)
    return max(-1.0, min(1.0, product / math.prod(lengths)))


def unmeasured_of(modules: Sequence[ModuleDiagnosis], values: Sequence[str]) -> tuple[Unmeasured, ...]:
    """What is missing, and why.

    Args:
        modules: those that were looked at.
        values: names of those that were not, since they hold no updates.
    """
    dense = tuple(module.module for module in modules if any(rank is None for rank in module.ranks))
    return tuple(
        Unmeasured(reason=reason, modules=names) for reason, names in ((DENSE, dense), (VALUES, tuple(values))) if names
    )
