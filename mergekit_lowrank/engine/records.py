"""What there is to say about a merged module."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, Update, compare, sign_conflict, singular_values
from mergekit_lowrank.policies import Compressed, Scaling, retained
from mergekit_lowrank.strategies import keyed_generator

__all__ = ["ARBITRARY_CUT", "ModuleRecord", "record_of"]

ENERGY_SHARE = 0.99
"""The share for which the record names the rank that would keep it."""
ARBITRARY_CUT = "cut between equal singular values"
"""Begins the warning of a module whose result depends on rounding, and so on the machine."""
EQUAL = 1e-5
"""Singular values that differ by less, relative to each other, are equal up to rounding in float32."""
SHOWN_VALUES = 64
"""Singular values in the record: as many as one looks at in a figure."""


@dataclass(frozen=True)
class ModuleRecord:
    """What the report says about one module.

    Attributes:
        module: its name in the base model.
        method: what merged it.
        space: where.
        participants: labels of the inputs that have it.
        rank: directions in the merged update as kept (padding apart); None for a dense one that is kept whole.
        energy: ‖ΔW‖²_F of the merged update before it was cut.
        kept_energy: share of it that was kept.
        cut_error: ‖M − M_rank‖_F / ‖M‖_F of the cut alone, M the merged update.
        rank_for_99: the rank that keeps 99 % of it; None where the spectrum was not computed that far.
        input_norms: ‖w_t ΔW_t‖_F of the participants.
        merged_norm: ‖ΔW‖_F as written.
        scale: factor of the scale policy.
        retention: Σ w<M, ΔW> / Σ |w|<ΔW, ΔW> as written; None for zero inputs.
        relative_error: ‖M − Σ c ΔW‖ / ‖Σ c ΔW‖ as written, c the weights the method aims at times ``scale``; None for a
            zero sum.
        relative_error_is_estimate: whether it was measured on 64 random inputs of the module, as it is where the joint
            rank of the inputs is above 256.
        cosines: (n, n) of the participants' updates, None where one is zero; empty where that joint rank is above 256.
        sign_conflict: the share of all |w·ΔW| that stands against the sign of its entry's weighted sum, in [0, 0.5];
            None for zero inputs.
        sign_conflict_error: its standard error: of modules with more than 16,384 entries 4,096 are looked at.
        spectrum: the largest singular values, at most 64, of the merged update before it was cut.
        input_spectra: those of w_t ΔW_t of each participant; empty of a dense one.
        peak_bytes: what the plan allowed for its merge.
        wall_seconds: of its merge, reading apart.
        warnings: what went differently than asked.
    """

    module: str
    method: str
    space: str
    participants: tuple[str, ...]
    rank: int | None
    energy: float
    kept_energy: float
    cut_error: float
    rank_for_99: int | None
    input_norms: tuple[float, ...]
    merged_norm: float
    scale: float
    retention: float | None
    relative_error: float | None
    relative_error_is_estimate: bool
    cosines: tuple[tuple[float | None, ...], ...]
    sign_conflict: float | None
    sign_conflict_error: float
    spectrum: tuple[float, ...]
    input_spectra: tuple[tuple[float, ...], ...]
    peak_bytes: int
    wall_seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleRecord:
        """The record that ``to_dict`` gave, after a way through JSON."""
        plain: dict[str, Any] = {name: _frozen(value) for name, value in data.items()}
        return cls(**plain)


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def record_of(
    plan: Plan,
    module: ModulePlan,
    updates: Sequence[InputUpdate],
    compressed: Compressed,
    written: Update,
    scaling: Scaling,
    start: float,
) -> ModuleRecord:
    """The record of a module.

    Args:
        plan: what is merged.
        module: of the plan.
        updates: of its participants.
        compressed: the merged update, scaled, and what its cut cost.
        written: the same as it is stored, in the compute type.
        scaling: what made it as large as it is.
        start: of the clock, when its merge began.
    """
    aims = [scaling.factor * c for c in module.group.strategy.target_weights(module.weights, module.total_weight)]
    found = compare(written, updates, aims, keyed_generator(plan.recipe.seed, module.name, "report"))
    conflict = sign_conflict(updates, module.weights, keyed_generator(plan.recipe.seed, module.name, "signs"))
    norms = tuple(abs(w) * own for own, w in zip(found.norms, module.weights, strict=True))
    is_lost = found.norm == 0 and scaling.factor != 0 and any(norms)
    return ModuleRecord(
        module=module.name,
        method=module.group.method,
        space=module.group.space.name,
        participants=tuple(plan.inputs[t].label for t in module.participants),
        rank=compressed.rank,
        energy=compressed.spectrum.energy,
        kept_energy=compressed.kept_energy,
        cut_error=compressed.error,
        rank_for_99=compressed.spectrum.rank_for(ENERGY_SHARE),
        input_norms=norms,
        merged_norm=found.norm,
        scale=scaling.factor,
        retention=retained(found.overlaps, [own * own for own in found.norms], module.weights),
        relative_error=found.relative_error,
        relative_error_is_estimate=found.is_estimate,
        cosines=tuple(tuple(c if c is None else _shortened(c) for c in row) for row in found.cosines),
        sign_conflict=None if conflict.opposed is None else _shortened(conflict.opposed),
        sign_conflict_error=_shortened(conflict.standard_error),
        spectrum=_leading(compressed.spectrum.values),
        input_spectra=_input_spectra(updates, module.weights),
        peak_bytes=module.peak_bytes,
        wall_seconds=time.perf_counter() - start,
        warnings=(*_warnings(scaling, is_lost=is_lost), *_arbitrary_cut(compressed)),
    )


def _warnings(scaling: Scaling, *, is_lost: bool) -> Iterator[str]:
    if scaling.warning:
        yield scaling.warning
    if is_lost:
        yield "merged to zero, though its inputs are not; the method drops all that they do not agree on"


def _arbitrary_cut(compressed: Compressed) -> Iterator[str]:
    """Of equal singular values any rotation of the directions is as right, so what is kept of them is chance."""
    rank, values = compressed.rank, compressed.spectrum.values
    if rank and rank < compressed.spectrum.resolved and values[rank - 1] - values[rank] <= EQUAL * values[rank - 1]:
        yield (
            f"{ARBITRARY_CUT} at rank {rank}: which directions are kept depends on rounding, and differs between "
            "machines; choose output.rank: sum, or another rank"
        )


def _input_spectra(updates: Sequence[InputUpdate], weights: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """|w|·σ of each input; empty of dense ones."""
    factored = [update for update in updates if isinstance(update, LowRankUpdate)]
    found = iter(singular_values(factored) if factored else ())
    spectra = [
        next(found) * abs(w) if isinstance(u, LowRankUpdate) else None for u, w in zip(updates, weights, strict=True)
    ]
    return tuple(() if values is None else _leading(values) for values in spectra)


def _leading(values: Tensor) -> tuple[float, ...]:
    return tuple(map(_shortened, values[:SHOWN_VALUES].tolist()))


def _shortened(number: float) -> float:
    """The number to six digits: what is shown of it, and half of its bytes."""
    return float(f"{number:.6g}")
