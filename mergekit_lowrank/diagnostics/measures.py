"""What is measured in one module: its inputs beside each other, and beside the merged update of the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_lowrank.diagnostics.diagnosis import Matrix, ModuleDiagnosis, Vector
from mergekit_lowrank.engine import ModulePlan, Plan, format_bytes
from mergekit_lowrank.engine.merging import Encodings, merge_inputs
from mergekit_lowrank.engine.surveying import Measure
from mergekit_lowrank.errors import MemoryBudgetError
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, Update, cosines_of, inner_products, norm, sign_conflict
from mergekit_lowrank.lowrank.comparison import CANCELLED
from mergekit_lowrank.lowrank.subspaces import JointDirections, joint_directions, turned_cosines
from mergekit_lowrank.spaces import ModuleShape
from mergekit_lowrank.strategies import Survey, keyed_generator

__all__ = ["ModuleMeasure", "measure_module", "with_room"]

HEAD_SHARE = 0.25
"""Of the singular directions, rounded up: the head are the leading ones, the tail as many trailing ones."""
LEADING_ERROR = 0.05
"""Leading directions hold an update to this relative error: ε of the subspace alignment ratio in its paper."""
FACTOR_BYTES = 48
"""For an entry of the stacked factors in float32: itself (4), in float64 beside its QR (16), as a formed basis (4) and,
beside a dense merged update, as vectors of all inputs in both types, with their images (24)."""
CORE_BYTES = 64
"""For an entry of an R × R matrix: eight of them in float64."""


class ModuleMeasure(Measure[ModuleDiagnosis]):
    """Everything about one module."""

    def __init__(self, plan: Plan, surveys: Mapping[str, Survey]) -> None:
        self._plan, self._surveys = plan, surveys

    def __call__(self, module: str, encodings: Encodings) -> ModuleDiagnosis:
        """The inputs are merged as the recipe says, and nothing is cut to a rank."""
        own = self._plan.module(module)
        merged = merge_inputs(self._plan, own, encodings, self._surveys.get(own.group.key))
        return measure_module(self._plan, own, merged.inputs, merged.update)


def with_room(plan: Plan) -> Plan:
    """The plan with modules that may hold what is measured in them, which can be more than their merge does.

    Raises:
        MemoryBudgetError: that of one does not fit.
    """
    modules = tuple(replace(own, peak_bytes=max(own.peak_bytes, _bytes(own.shape))) for own in plan.modules)
    worst = max(modules, key=lambda own: own.peak_bytes)
    if worst.peak_bytes > plan.modules_bytes:
        least = format_bytes(worst.peak_bytes + plan.overhead_bytes)
        raise MemoryBudgetError(
            f"to diagnose module '{worst.name}' takes {format_bytes(worst.peak_bytes)}, more than to merge it, as the "
            f"ranks of its inputs add up to {worst.shape.joint_rank}; it may hold {format_bytes(plan.memory_bytes)}, "
            f"of which {format_bytes(plan.overhead_bytes)} are for itself. Allow {least} with --memory."
        )
    return replace(plan, modules=modules)


def _bytes(shape: ModuleShape) -> int:
    return FACTOR_BYTES * shape.factor_entries + CORE_BYTES * shape.joint_rank**2 if shape.factor_entries else 0


def measure_module(plan: Plan, module: ModulePlan, updates: Sequence[InputUpdate], merged: Update) -> ModuleDiagnosis:
    """What there is to say about one module.

    Args:
        plan: of the merge.
        module: which.
        updates: ΔW_t of its participants, in the compute type.
        merged: the merged update, before it is cut to a rank.
    """
    factors = [update for update in updates if isinstance(update, LowRankUpdate)]
    joint = joint_directions(factors) if factors else None
    products = joint.inner_products() if joint and len(factors) == len(updates) else inner_products(updates)
    norms = products.diagonal().clamp(min=0).sqrt()
    signs = sign_conflict(updates, module.weights, keyed_generator(plan.recipe.seed, module.name, "signs"))
    return ModuleDiagnosis(
        module=module.name,
        d_out=module.shape.d_out,
        d_in=module.shape.d_in,
        participants=tuple(plan.inputs[t].label for t in module.participants),
        weights=module.weights,
        norms=tuple(norms.tolist()),
        shares=_shares(norms, module.weights),
        cosines=cosines_of(products),
        sign_conflicts=_matrix(signs.pairs),
        sign_conflicts_error=signs.pair_error,
        sign_conflict=signs.opposed,
        sign_conflict_error=signs.standard_error,
        signs_are_sampled=not signs.is_exact,
        output_rank=module.rank.planned if module.is_factored else None,
        is_cut=_is_cut(module, merged),
        merged_norm=norm(merged),
        **_of_factors(module, updates, joint, merged),
    )


def _is_cut(module: ModulePlan, merged: Update) -> bool:
    """Whether the merged update may have more directions than are written."""
    rank = module.rank.planned if module.is_factored else None
    return rank is not None and not (isinstance(merged, LowRankUpdate) and merged.rank <= rank)


def _of_factors(
    module: ModulePlan, updates: Sequence[InputUpdate], joint: JointDirections | None, merged: Update
) -> dict[str, Any]:
    """The fields that need factors, with None for dense inputs."""
    places = _Places(len(updates), [t for t, update in enumerate(updates) if isinstance(update, LowRankUpdate)])
    if joint is None:
        return places.nothing()
    weights = [module.weights[t] for t in places.taken]
    aligned = [joint.alignments(own, LEADING_ERROR) for own in (joint.right, joint.left)]
    whole = _sum_values(joint, weights) if len(places.taken) == places.count else None
    ranks = [own.rank for own in joint.updates]
    parts = torch.split(turned_cosines(merged, joint, weights), ranks)
    return {
        "ranks": places.vector(ranks),
        "stable_ranks": places.vector([_stable_rank(own.values) for own in joint.updates]),
        "effective_ranks": places.vector([_effective_rank(own.values) for own in joint.updates]),
        "gaps": places.vector([float(own.values[0] / own.values[-1]) if own.rank else None for own in joint.updates]),
        "row_overlaps": places.matrix(joint.overlaps(joint.right)),
        "column_overlaps": places.matrix(joint.overlaps(joint.left)),
        "smallest_row_angles": places.matrix(joint.smallest_angles(joint.right)),
        "smallest_column_angles": places.matrix(joint.smallest_angles(joint.left)),
        "row_alignments": places.matrix(aligned[0]),
        "column_alignments": places.matrix(aligned[1]),
        "core_overlap": _core_overlap(aligned),
        "robustness_head": places.vector([_mean(part[: _end(part)]) for part in parts]),
        "robustness_tail": places.vector([_mean(part[-_end(part) :]) if len(part) > 1 else None for part in parts]),
        "sum_effective_rank": None if whole is None else _effective_rank(whole),
        "sum_kept_energy": None if whole is None else _kept(whole, module.rank.planned),
    }


@dataclass(frozen=True)
class _Places:
    """Where the low-rank inputs stand among all participants.

    Attributes:
        count: of all.
        taken: the places of the low-rank ones.
    """

    count: int
    taken: Sequence[int]

    def vector(self, numbers: Sequence[Any]) -> tuple[Any, ...]:
        own = dict(zip(self.taken, numbers, strict=True))
        return tuple(own.get(t) for t in range(self.count))

    def matrix(self, table: Tensor) -> Matrix:
        own = dict(zip(self.taken, map(self.vector, _matrix(table)), strict=True))
        return tuple(own.get(t, (None,) * self.count) for t in range(self.count))

    def nothing(self) -> dict[str, Any]:
        empty: Vector = (None,) * self.count
        vectors = ("ranks", "stable_ranks", "effective_ranks", "gaps", "robustness_head", "robustness_tail")
        sides = [f"{side}_{kind}" for side in ("row", "column") for kind in ("overlaps", "alignments")]
        matrices = (*sides, "smallest_row_angles", "smallest_column_angles")
        alone = dict.fromkeys(("core_overlap", "sum_effective_rank", "sum_kept_energy"))
        return dict.fromkeys(vectors, empty) | dict.fromkeys(matrices, (empty,) * self.count) | alone


def _matrix(table: Tensor) -> Matrix:
    return tuple(tuple(None if math.isnan(value) else value for value in row) for row in table.tolist())


def _shares(norms: Tensor, weights: Sequence[float]) -> Vector:
    energies = (norms * norms.new_tensor(weights)).square()
    total = float(energies.sum())
    return tuple((energies / total).tolist()) if total else (None,) * len(weights)


def _stable_rank(values: Tensor) -> float | None:
    """Σσ² / σ₁², between 1 and the rank (Rudelson & Vershynin 2007, arXiv:math/0503442); None of a zero update."""
    return float((values / values[0]).square().sum()) if values.numel() and values[0] else None


def _effective_rank(values: Tensor) -> float | None:
    """exp(−Σ p·ln p) with p = σ / Σσ (Roy & Vetterli 2007, EUSIPCO); None of a zero update."""
    total = float(values.sum())
    return math.exp(float(torch.special.entr(values / total).sum())) if total else None


def _sum_values(joint: JointDirections, weights: Sequence[float]) -> Tensor | None:
    """The singular values of Σ w ΔW; None where it is zero or has cancelled to rounding."""
    values = joint.weighted_values(weights)
    size = sum(abs(w) * float(own.values.norm()) for own, w in zip(joint.updates, weights, strict=True))
    return values if float(values.norm()) > CANCELLED * size else None


def _kept(values: Tensor, rank: int | None) -> float | None:
    """Share of Σσ² in the leading ``rank``; None where the rank is not known."""
    return None if rank is None else float(values[:rank].square().sum() / values.square().sum())


def _core_overlap(aligned: Sequence[Tensor]) -> tuple[float, float] | None:
    """The mean over ordered pairs of two inputs, of both sides; None without a pair."""
    found = [_mean(table[~torch.eye(len(table), dtype=torch.bool)]) for table in aligned]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _end(part: Tensor) -> int:
    """How many directions are the head, or the tail; at least one."""
    return max(1, math.ceil(HEAD_SHARE * len(part)))


def _mean(values: Tensor) -> float | None:
    """Of those that are numbers; None where there is none."""
    known = values[~values.isnan()]
    return float(known.mean()) if known.numel() else None
