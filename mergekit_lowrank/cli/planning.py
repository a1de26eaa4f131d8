"""``plan``: what a merge would do, as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import click

from mergekit_lowrank.api import plan
from mergekit_lowrank.cli.headers import type_name
from mergekit_lowrank.cli.request import Request
from mergekit_lowrank.cli.tables import aligned, fields, spans
from mergekit_lowrank.engine import ModulePlan, Plan, format_bytes
from mergekit_lowrank.recipe import parse_bytes

__all__ = ["run_plan"]

SHOWN_LABELS = 3
"""Participants are named up to this many; beyond, those that are missing are."""
COLUMNS = ("modules", "count", "out x in", "inputs", "ranks", "method", "space", "rank", "peak")
NUMBERS = ("count", "out x in", "rank", "peak")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def run_plan(request: Request, *, memory: str | None, strict: bool, every: bool, as_json: bool) -> None:
    """Plan, and print the table or the JSON."""
    made = plan(request.load(), memory_bytes=parse_bytes(memory) if memory else None, strict=strict)
    click.echo(json.dumps(made.to_dict(), indent=1) if as_json else "\n".join(_lines(made, every=every)))


def _lines(made: Plan, *, every: bool) -> Iterator[str]:
    rows = [_row(made, [module]) for module in made.modules] if every else _collapsed(made)
    yield from aligned(COLUMNS, rows, right=NUMBERS)
    yield ""
    yield from fields(_totals(made))


def _collapsed(made: Plan) -> list[tuple[str, ...]]:
    """Rows of modules that differ in their layer only, each row once."""
    alike: dict[tuple[str, ...], list[ModulePlan]] = {}
    for module in made.modules:
        rest = _row(made, [module])[1:]
        alike.setdefault((_INDEX.sub("*", module.name), *rest), []).append(module)
    return [_row(made, modules) for modules in alike.values()]


def _row(made: Plan, modules: Sequence[ModulePlan]) -> tuple[str, ...]:
    """The cells of modules that are alike."""
    first = modules[0]
    return (
        _pattern([module.name for module in modules]),
        str(len(modules)),
        f"{first.shape.d_out} x {first.shape.d_in}",
        _participants(made, first),
        _ranks(first.shape.ranks),
        first.group.method,
        first.group.space.name,
        f"by {first.rank.name}" if first.rank.planned is None else str(first.rank.planned),
        format_bytes(first.peak_bytes),
    )


def _pattern(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: ``layers.{0-11}.query``."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(_INDEX.findall(name) for name in names), strict=True)
    shown = iter([spans(map(int, column)) for column in columns])
    return _INDEX.sub(lambda _: span if (span := next(shown)).isdigit() else f"{{{span}}}", names[0])


def _participants(made: Plan, module: ModulePlan) -> str:
    if len(module.participants) == len(made.inputs):
        return f"all {len(made.inputs)}"
    if len(module.participants) <= SHOWN_LABELS:
        return ", ".join(made.inputs[t].label for t in module.participants)
    absent = [c.label for t, c in enumerate(made.inputs) if t not in module.participants]
    more = f" and {len(absent) - SHOWN_LABELS} more" if len(absent) > SHOWN_LABELS else ""
    return f"all but {', '.join(absent[:SHOWN_LABELS])}{more}"


def _ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else "/".join(map(str, ranks))


def _totals(made: Plan) -> Iterator[tuple[str, str]]:
    yield "inputs", f"{len(made.inputs)}, base model {made.base_model or 'not named'}"
    yield "modules", str(len(made.modules))
    yield "reads", f"{format_bytes(made.bytes_read)} of tensors"
    yield "writes", _written(made)
    yield "types", f"computes in {type_name(made.compute_dtype)}, stores {type_name(made.out_dtype)}"
    yield (
        "memory",
        (
            f"{format_bytes(made.peak_bytes)} for the largest module; at most {format_bytes(made.memory_bytes)} "
            "for all modules in flight (--memory)"
        ),
    )
    for warning in made.warnings:
        yield "warning", warning


def _written(made: Plan) -> str:
    if made.budget_bytes is not None:
        return f"at most {format_bytes(made.budget_bytes)} of tensors, spread over the modules; each is merged twice"
    accepted = ", ".join(map(str, made.accepted_ranks))
    snapped = f"; each is raised to the next of {accepted}" if accepted else ""
    if made.bytes_written is None:
        return f"known once the ranks are{snapped}"
    padded = "" if made.uniform_rank is None else f", every module padded to rank {made.uniform_rank}"
    return f"{format_bytes(made.bytes_written)} of tensors{padded}"
