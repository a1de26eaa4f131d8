"""Rules that turn the measures of a diagnosis into sentences; docs/reference/findings.md describes each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Literal

from mergekit_lowrank.diagnostics.diagnosis import Diagnosis, Finding, InputDiagnosis, Matrix, ModuleDiagnosis
from mergekit_lowrank.diagnostics.overall import common_modules, mean, weighted_energy
from mergekit_lowrank.diagnostics.wording import NAMED, counted, named, others, percent, short

__all__ = ["RULES", "findings_of"]

DUPLICATE = 0.999
"""Cosine over all modules. An adapter that was rounded to bfloat16 has 0.99999 with itself."""
OPPOSED = -0.2
"""2<x, y> / (‖x‖² + ‖y‖²) of the weighted updates, their cosine if both are as long: the sum has lost a fifth of its
energy."""
DOMINATES, DRAWS_ATTENTION = 10.0, 3.0
"""Weighted norm over the median of the others'. Above 10 each of the others has less than a hundredth of its energy."""
NEARLY_ZERO = 1e3
"""Beyond this ratio of norms no weight is advised: one of the two is a mistake."""
OVERLAPS = 0.5
"""Mean cos² of principal angles: half of the directions of the smaller space are in the other one."""
BY_CHANCE = 2.0
"""Random spaces of k of d directions overlap k / d; an overlap below twice that says nothing."""
CONFLICTS = 0.02
"""Share of opposed signs over the 0.5 of unrelated updates, and above three standard errors."""
ERRORS = 3.0
TURNED, TURNED_MORE = 0.7, 0.15
"""Direction robustness of the tail at or below 0.7 (turned by 45° or more), and this far below that of the head."""
KEPT, KEPT_LITTLE = 0.95, 0.8
"""Share of the energy of Σ w ΔW that its best cut to the output rank keeps."""

JOINT_SPACES = frozenset({"joint", "core", "tucker"})
"""Their coordinates are directions that all inputs share."""

Rule = Callable[[Diagnosis], Iterator[Finding]]


def findings_of(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """What a user should know, warnings first, in the order of the rules; if there is nothing, that."""
    order = {"warning": 0, "notice": 1, "info": 2}
    found = [finding for rule in RULES for finding in rule(diagnosis)]
    if all(finding.severity == "info" for finding in found):
        found.insert(0, _nothing(diagnosis))
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def _zero_inputs(diagnosis: Diagnosis) -> Iterator[Finding]:
    for own in diagnosis.inputs:
        zeros = [
            module.module
            for module in diagnosis.modules
            if own.label in module.participants and not module.norms[module.participants.index(own.label)]
        ]
        if own.norm == 0:
            yield Finding(
                rule="zero_input",
                severity="warning",
                message=f"{own.label} is zero in every module that it has: it changes nothing",
                inputs=(own.label,),
                numbers={"modules": own.modules},
                advice="look whether it is the checkpoint you meant: B is zero before the first step of a training; "
                "else take it out, since means divide by its weight too",
            )
        elif own.weighted_norm == 0:
            is_all = not any(other.weighted_norm for other in diagnosis.inputs)
            yield Finding(
                rule="zero_weight",
                severity="warning" if is_all else "notice",
                message=f"{own.label} has a weight of 0 in every module: it changes nothing"
                + (", as all other inputs: the merge is zero" if is_all else ""),
                inputs=(own.label,),
                numbers={"norm": own.norm},
                advice="give it a weight, or take it out: means divide by its place in the recipe too",
            )
        elif zeros:
            yield Finding(
                rule="zero_modules",
                severity="notice",
                message=f"{own.label} is zero in {_where(zeros, diagnosis)}, of the {own.modules} modules it has",
                inputs=(own.label,),
                modules=tuple(zeros),
                numbers={"modules": len(zeros), "of": own.modules},
                advice="these were not trained, or lost in a conversion; compare with inspect",
            )


def _duplicates(diagnosis: Diagnosis) -> Iterator[Finding]:
    pairs = [pair for pair in _pairs(diagnosis, diagnosis.pairs.cosines) if pair.value >= DUPLICATE]
    pairs = [pair for pair in pairs if _norm_ratio(diagnosis, pair)]
    if pairs:
        first = max(pairs, key=lambda pair: pair.value)
        s, t = (diagnosis.inputs[k] for k in (first.s, first.t))
        common = [(module.module, module.norms[i], module.norms[j]) for module, i, j in _common(diagnosis, first)]
        ratio = math.hypot(*(own for _, own, _ in common)) / math.hypot(*(own for _, _, own in common))
        size = "" if math.isclose(ratio, 1, rel_tol=1e-3) else f", at {short(ratio)} times the norm"
        is_part = len(common) < len(diagnosis.modules)
        where = f" in {_where([name for name, _, _ in common], diagnosis)}, all that both have" if is_part else ""
        yield Finding(
            rule="duplicate_inputs",
            severity="warning",
            message=f"{s.label} and {t.label} are the same update{where}{size} (cosine {first.value:.4f})"
            f"{_others(pairs)}",
            inputs=_labels(pairs, diagnosis),
            numbers={"cosine": first.value, "norm_ratio": ratio, "pairs": len(pairs)},
            advice="keep one of them, or it counts twice",
        )


def _opposed(diagnosis: Diagnosis) -> Iterator[Finding]:
    pairs = [*_cancelling(diagnosis)]
    if pairs:
        first = min(pairs, key=lambda pair: pair.value)
        s, t = (diagnosis.inputs[k] for k in (first.s, first.t))
        where = [
            module.module
            for module, i, j in _common(diagnosis, first)
            if _sign(module.weights[i]) * _sign(module.weights[j]) * (module.cosines[i][j] or 0.0) <= OPPOSED
        ]
        yield Finding(
            rule="opposed_inputs",
            severity="warning",
            message=f"{s.label} and {t.label}, times their weights, point against each other in "
            f"{_where(where, diagnosis)} (cosine {first.value:.2f} over all){_others(pairs)}: their sum cancels",
            inputs=_labels(pairs, diagnosis),
            modules=tuple(where),
            numbers={"cosine": first.value, "pairs": len(pairs), "modules": len(where)},
            advice="look at the signs of the weights, and whether both belong into one merge; a method that elects "
            "signs (knots, drm, ties) keeps one side where a sum keeps neither",
        )


def _dominating(diagnosis: Diagnosis) -> Iterator[Finding]:
    for own, ratio in _dominators(diagnosis).values():
        yield Finding(
            rule="dominating_norm",
            severity="warning" if ratio >= DOMINATES else "notice",
            message=f"{own.label}, times its weight, has {short(ratio)} × the norm of the others (their median) "
            f"and {percent(own.share or 0)} of the energy",
            inputs=(own.label,),
            numbers={"ratio": ratio, "share": own.share or 0.0, "levelling_factor": 1 / ratio},
            advice=f"normalise, or it dominates: {_levelled(own, ratio)}; look at its alpha too, which may be counted "
            "twice",
        )


def _vanishing(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Beside one that dominates the others are small, not vanishing; so it does not count."""
    dominators = _dominators(diagnosis)
    for own in diagnosis.inputs if len(diagnosis.inputs) > 2 else ():
        others = [o.weighted_norm for o in diagnosis.inputs if o is not own and o.label not in dominators]
        usual = median(others) if others else 0.0
        ratio = own.weighted_norm / usual if usual else 1.0
        if 0 < ratio <= 1 / DOMINATES:
            yield Finding(
                rule="vanishing_norm",
                severity="notice",
                message=f"{own.label}, times its weight, has 1/{short(1 / ratio)} of the norm of the others (their "
                "median): little of it will be left",
                inputs=(own.label,),
                numbers={"ratio": ratio, "share": own.share or 0.0, "levelling_factor": 1 / ratio},
                advice=_levelled(own, ratio),
            )


def _dominators(diagnosis: Diagnosis) -> dict[str, tuple[InputDiagnosis, float]]:
    """By label, those that stand out, with their weighted norm over the median of the others'."""
    found = {}
    for own in diagnosis.inputs:
        others = [other.weighted_norm for other in diagnosis.inputs if other is not own and other.weighted_norm]
        ratio = own.weighted_norm / median(others) if others else 0.0
        if ratio >= DRAWS_ATTENTION:
            found[own.label] = own, ratio
    return found


def _levelled(own: InputDiagnosis, ratio: float) -> str:
    low, high = own.weights
    if max(ratio, 1 / ratio) > NEARLY_ZERO:
        return (
            "so far apart, one side is nearly zero: look whether it was trained, and at its scaling, before any weight"
        )
    if low == high:
        return f"a weight of {short(high / ratio)} gives it the norm of the others"
    return f"its weights times {short(1 / ratio)} give it the norm of the others"


def _shared_columns(diagnosis: Diagnosis) -> Iterator[Finding]:
    is_joint = set(diagnosis.spaces) <= JOINT_SPACES
    advice = (
        "what they share is merged as such already"
        if is_joint
        else "they write into the same output directions: prefer a method in joint coordinates, where what they share "
        "is one direction and not many entries: knots, drm, core_ties, or space: joint"
    )
    yield from _shared_subspace(
        diagnosis,
        "column",
        rule="shared_columns",
        severity="info" if is_joint else "notice",
        advice=advice,
    )


def _shared_rows(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Told, and no more: A is random at first and moves little, so one seed gives all adapters the same rows."""
    advice = (
        "adapters that start from the same random A keep most of its rows, whatever they learn; where pairs were "
        "measured, this said nothing of what they lose"
    )
    yield from _shared_subspace(
        diagnosis,
        "row",
        rule="shared_rows",
        severity="info",
        advice=advice,
    )


def _overlapping(diagnosis: Diagnosis, pair: _Pair, side: str) -> dict[str, float]:
    """The overlaps of the modules in which there is one to speak of."""
    found = {}
    for module, i, j in _common(diagnosis, pair):
        overlap = (module.row_overlaps if side == "row" else module.column_overlaps)[i][j]
        by_chance = max(module.ranks[i] or 0, module.ranks[j] or 0) / (module.d_in if side == "row" else module.d_out)
        if overlap is not None and overlap >= max(OVERLAPS, BY_CHANCE * by_chance):
            found[module.module] = overlap
    return found


def _shared_subspace(
    diagnosis: Diagnosis, side: Literal["row", "column"], *, rule: str, severity: Literal["info", "notice"], advice: str
) -> Iterator[Finding]:
    pairs = [pair for pair in _pairs(diagnosis, diagnosis.pairs.cosines) if abs(pair.value) < DUPLICATE]
    places = {pair: _overlapping(diagnosis, pair, side) for pair in pairs}
    found = {pair: where for pair, where in places.items() if where}
    if not found:
        return
    pair = max(found, key=lambda own: math.fsum(found[own].values()))
    where = tuple(found[pair])
    overlap = math.fsum(found[pair].values()) / len(where)
    s, t = diagnosis.inputs[pair.s], diagnosis.inputs[pair.t]
    yield Finding(
        rule=rule,
        severity=severity,
        message=f"the {side} spaces of {s.label} and {t.label} overlap {overlap:.2f} in {_where(where, diagnosis)} "
        f"(cosine of the updates {pair.value:.2f}){_others(found)}",
        inputs=_labels(found, diagnosis),
        modules=where,
        numbers={"overlap": overlap, "cosine": pair.value, "modules": len(where), "pairs": len(found)},
        advice=advice,
    )


def _sign_conflicts(diagnosis: Diagnosis) -> Iterator[Finding]:
    pairs = [
        pair
        for pair in _pairs(diagnosis, diagnosis.pairs.sign_conflicts)
        if pair.value - 0.5 > max(CONFLICTS, ERRORS * _sign_error(diagnosis, pair))
        and _norm_ratio(diagnosis, pair) * DOMINATES >= 1
    ]
    if pairs:
        first = max(pairs, key=lambda pair: pair.value)
        s, t = diagnosis.inputs[first.s], diagnosis.inputs[first.t]
        mass = diagnosis.sign_conflict or 0.0
        yield Finding(
            rule="sign_conflict",
            severity="notice",
            message=f"the signs of {s.label} and {t.label} differ in {percent(first.value, 1)} of their entries, where "
            f"unrelated updates have 50 %{_others(pairs)}; {percent(mass)} of all that is added is against the sign "
            "that wins",
            inputs=_labels(pairs, diagnosis),
            numbers={
                "share": first.value,
                "unrelated": 0.5,
                "standard_error": _sign_error(diagnosis, first),
                "opposed_mass": mass,
                "pairs": len(pairs),
            },
            advice="a method that elects signs (knots, ties, drm) keeps what a sum cancels",
        )


def _turned_tails(diagnosis: Diagnosis) -> Iterator[Finding]:
    turned = [
        (own, own.robustness_head, own.robustness_tail)
        for own in diagnosis.inputs
        if own.robustness_head is not None
        and own.robustness_tail is not None
        and own.robustness_tail <= min(TURNED, own.robustness_head - TURNED_MORE)
    ]
    if turned:
        own, head, tail = min(turned, key=lambda entry: entry[2] - entry[1])
        more = f"; so are those of {named([other.label for other, _, _ in turned if other is not own])}"
        yield Finding(
            rule="turned_tail",
            severity="info",
            message=f"the weak singular directions of {own.label} are turned far more than its strong ones: cosine "
            f"{tail:.2f} against {head:.2f} in what {diagnosis.method} makes of it{more if len(turned) > 1 else ''}",
            inputs=tuple(entry[0].label for entry in turned),
            numbers={"head": head, "tail": tail, "gap": own.gap or 0.0, "inputs": len(turned)},
            advice="so it is with most trained adapters. robustmerge means to keep weak directions: diagnose it and "
            "task_arithmetic, and evaluate where these cosines differ",
        )


def _coverage(diagnosis: Diagnosis) -> Iterator[Finding]:
    total = len(diagnosis.modules)
    partial = [own for own in diagnosis.inputs if own.modules < total]
    if partial:
        listed = ", ".join(f"{own.label} {own.modules}" for own in partial[:NAMED])
        more = f" and {len(partial) - NAMED} more" if len(partial) > NAMED else ""
        yield Finding(
            rule="coverage",
            severity="notice",
            message=f"inputs do not have the same modules: of {total}, {listed}{more}",
            inputs=tuple(own.label for own in partial),
            modules=tuple(m.module for m in diagnosis.modules if len(m.participants) < len(diagnosis.inputs)),
            numbers={"modules": total, **{f"modules of {own.label}": own.modules for own in partial}},
            advice="decide by the key missing: zero lets a mean divide by all weights, present by those that have the "
            "module",
        )


def _rank_cuts(diagnosis: Diagnosis) -> Iterator[Finding]:
    cut = [module for module in diagnosis.modules if module.is_cut and module.sum_kept_energy is not None]
    kept = mean((module.sum_kept_energy, weighted_energy(module)) for module in cut)
    effective = mean((module.sum_effective_rank, weighted_energy(module)) for module in cut)
    if kept is not None and effective is not None and kept < KEPT:
        ranks = sorted({module.output_rank for module in cut if module.output_rank is not None})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield Finding(
            rule="rank_cut",
            severity="warning" if kept < KEPT_LITTLE else "notice",
            message=f"rank {rank} keeps {percent(kept)} of the energy of the weighted sum, whose effective rank is "
            f"{short(effective)}: the cut will lose the rest",
            numbers={"kept_energy": kept, "effective_rank": effective, "rank": float(ranks[-1])},
            advice="raise output.rank: a number, sum, or {energy: 0.99}",
        )


def _unmeasured(diagnosis: Diagnosis) -> Iterator[Finding]:
    for own in diagnosis.unmeasured:
        total = len({*own.modules, *(module.module for module in diagnosis.modules)})
        yield Finding(
            rule="unmeasured",
            severity="info",
            message=f"not everything was measured in {counted(own.modules, total)}: {own.reason}",
            modules=own.modules,
            numbers={"modules": len(own.modules)},
        )


RULES: tuple[Rule, ...] = (
    _zero_inputs,
    _duplicates,
    _opposed,
    _dominating,
    _vanishing,
    _rank_cuts,
    _shared_columns,
    _turned_tails,
    _sign_conflicts,
    _coverage,
    _shared_rows,
    _unmeasured,
)
"""In the order in which they are told; warnings come first."""


def _nothing(diagnosis: Diagnosis) -> Finding:
    cosines = [pair.value for pair in _pairs(diagnosis, diagnosis.pairs.cosines)]
    overlaps = [
        pair.value
        for table in (diagnosis.pairs.row_overlaps, diagnosis.pairs.column_overlaps)
        for pair in _pairs(diagnosis, table)
    ]
    numbers = {
        **({"largest_cosine": max(cosines, key=abs)} if cosines else {}),
        **({"largest_overlap": max(overlaps)} if overlaps else {}),
    }
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in numbers.items())
    return Finding(
        rule="nothing_found",
        severity="info",
        message=f"no rule found anything{f' ({told})' if told else ''}",
        numbers=numbers,
        advice="this is no promise: what a merge costs in accuracy shows in an evaluation only",
    )


@dataclass(frozen=True)
class _Pair:
    """Two inputs by their places, and what is known of them."""

    s: int
    t: int
    value: float


def _pairs(diagnosis: Diagnosis, table: Matrix) -> list[_Pair]:
    """Those of two inputs of which something is known."""
    found = ((s, t, table[s][t]) for s, t in combinations(range(len(diagnosis.inputs)), 2))
    return [_Pair(s, t, value) for s, t, value in found if value is not None]


def _common(diagnosis: Diagnosis, pair: _Pair) -> Iterator[tuple[ModuleDiagnosis, int, int]]:
    """The modules that both inputs have, with their places among the participants."""
    return common_modules(diagnosis.inputs[pair.s].label, diagnosis.inputs[pair.t].label, diagnosis.modules)


def _norm_ratio(diagnosis: Diagnosis, pair: _Pair) -> float:
    """The smaller weighted norm over the larger; 0 where either is zero."""
    low, high = sorted(diagnosis.inputs[place].weighted_norm for place in (pair.s, pair.t))
    return low / high if high else 0.0


def _cancelling(diagnosis: Diagnosis) -> Iterator[_Pair]:
    """Pairs x, y of updates times weights with 2<x, y> / (‖x‖² + ‖y‖²) ≤ −0.2, over all common modules; their cosines.

    So much of their energy the sum loses. A negative weight turns an update round.
    """
    for pair in _pairs(diagnosis, diagnosis.pairs.cosines):
        products, first, second = [], [], []
        for module, i, j in _common(diagnosis, pair):
            first.append(module.weights[i] * module.norms[i])
            second.append(module.weights[j] * module.norms[j])
            products.append((module.cosines[i][j] or 0.0) * first[-1] * second[-1])
        x, y, product = math.hypot(*first), math.hypot(*second), math.fsum(products)
        if x and y and 2 * product <= OPPOSED * (x * x + y * y):
            yield _Pair(pair.s, pair.t, product / (x * y))


def _sign(number: float) -> float:
    return float((number > 0) - (number < 0))


def _sign_error(diagnosis: Diagnosis, pair: _Pair) -> float:
    """Standard error of a pair's share over all modules, which are sampled apart."""
    weighted = [(m.norms[i] * m.norms[j], m.sign_conflicts_error) for m, i, j in _common(diagnosis, pair)]
    total = math.fsum(weight for weight, _ in weighted)
    return math.hypot(*(weight * error for weight, error in weighted)) / total if total else 0.0


def _labels(pairs: Iterable[_Pair], diagnosis: Diagnosis) -> tuple[str, ...]:
    places = sorted({place for pair in pairs for place in (pair.s, pair.t)})
    return tuple(diagnosis.inputs[place].label for place in places)


def _others(pairs: Collection[_Pair]) -> str:
    return others(len(pairs) - 1)


def _where(modules: Sequence[str], diagnosis: Diagnosis) -> str:
    return counted(modules, len(diagnosis.modules))
