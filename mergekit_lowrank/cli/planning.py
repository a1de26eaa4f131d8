"""``plan``: what a merge would do, as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

import click

from mergekit_lowrank.api import plan_variants
from mergekit_lowrank.cli.request import Request
from mergekit_lowrank.cli.tables import aligned, fields, spans
from mergekit_lowrank.engine import ModulePlan, Plan, format_bytes
from mergekit_lowrank.inspection.headers import type_name
from mergekit_lowrank.policies import WholeRank
from mergekit_lowrank.recipe import bytes_of

__all__ = ["run_plan"]

SHOWN_LABELS = 3
"""Participants are named up to this many; beyond, those that are missing are."""
COLUMNS = ("modules", "count", "out x in", "inputs", "ranks", "method", "space", "rank", "peak")
DISK_COLUMN = "on disk"
NUMBERS = ("count", "out x in", "rank", "peak", DISK_COLUMN)
VARIANT_COLUMNS = ("variant", "method", "space", "rank", "writes", "peak")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def run_plan(
    request: Request,
    *,
    memory: str | None,
    executor: str | None,
    workers: int | None,
    strict: bool,
    every: bool,
    as_json: bool,
) -> None:
    """Plan, and print the table or the JSON; of a sweep every variant."""
    recipe = request.load()
    plans = plan_variants(recipe, memory_bytes=bytes_of(memory), executor=executor, workers=workers, strict=strict)
    if as_json:
        said = {name: made.to_dict() for name, made in plans.items()}
        click.echo(json.dumps({"variants": said} if recipe.sweep else said[""], indent=1))
    elif recipe.sweep and not every:
        click.echo("\n".join(_lines_of_sweep(plans)))
    else:
        shown = [[*([f"{name}:"] if name else []), *_lines(made, every=every)] for name, made in plans.items()]
        click.echo("\n\n".join("\n".join(lines) for lines in shown))


def _lines_of_sweep(plans: Mapping[str, Plan]) -> Iterator[str]:
    yield from aligned(VARIANT_COLUMNS, [_row_of_variant(name, made) for name, made in plans.items()], right=("peak",))
    yield ""
    largest = max(plans.values(), key=lambda made: made.peak_bytes)
    warnings = dict.fromkeys(warning for made in plans.values() for warning in made.warnings)
    yield from fields(
        [
            ("variants", f"{len(plans)}, each written into a directory of its name; inputs are read once for all"),
            ("inputs", _inputs(largest)),
            ("reads", _read(largest)),
            ("memory", _memory(largest)),
            *(("warning", warning) for warning in warnings),
        ]
    )


def _row_of_variant(name: str, made: Plan) -> tuple[str, ...]:
    modules = made.modules
    cells = (
        [module.group.method for module in modules],
        [module.group.space.name for module in modules],
        [_rank(module) for module in modules],
    )
    return name, *(", ".join(dict.fromkeys(cell)) for cell in cells), _written(made), format_bytes(made.peak_bytes)


def _lines(made: Plan, *, every: bool) -> Iterator[str]:
    rows = [_row(made, [module]) for module in made.modules] if every else _collapsed(made)
    columns = (*COLUMNS, *((DISK_COLUMN,) if _goes_through_disk(made) else ()))
    yield from aligned(columns, rows, right=NUMBERS)
    yield ""
    yield from fields(_totals(made))


def _goes_through_disk(made: Plan) -> bool:
    return any(module.scratch_bytes for module in made.modules)


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
        _rank(first),
        format_bytes(first.peak_bytes),
        *([format_bytes(first.scratch_bytes)] if _goes_through_disk(made) else []),
    )


def _rank(module: ModulePlan) -> str:
    if isinstance(module.rank, WholeRank):
        return "whole"
    return f"by {module.rank.name}" if module.rank.planned is None else str(module.rank.planned)


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
    yield "inputs", _inputs(made)
    yield "modules", str(len(made.modules))
    yield "reads", _read(made)
    yield "writes", _written(made)
    yield "types", f"computes in {type_name(made.compute_dtype)}, stores {type_name(made.out_dtype)}"
    yield "memory", _memory(made)
    on_disk = [module.scratch_bytes for module in made.modules if module.scratch_bytes]
    if on_disk:
        largest = format_bytes(max(on_disk))
        yield "disk", f"{len(on_disk)} of {len(made.modules)} modules go through a file on disk, of up to {largest}"
    for warning in made.warnings:
        yield "warning", warning


def _inputs(made: Plan) -> str:
    return f"{len(made.inputs)}, base model {made.base_model or 'not named'}"


def _read(made: Plan) -> str:
    of_inputs = f"{format_bytes(made.bytes_read)} of tensors"
    if made.fold is None:
        return of_inputs
    return f"{of_inputs}, and the base model: {format_bytes(made.fold.base_bytes)}"


def _memory(made: Plan) -> str:
    return (
        f"{format_bytes(made.peak_bytes)} for the largest module, {format_bytes(made.overhead_bytes)} beside the "
        f"modules; at most {format_bytes(made.memory_bytes)} in all (--memory)"
    )


def _written(made: Plan) -> str:
    if made.fold is not None:
        fold, files = made.fold, len(made.fold.layout.files)
        changed = f"{len(fold.keys)} of {len(fold.keys) + len(fold.copied)} tensors changed"
        return f"{format_bytes(fold.layout.total_bytes)} in {files} {'file' if files == 1 else 'files'}, {changed}"
    if made.budget_bytes is not None:
        return f"at most {format_bytes(made.budget_bytes)} of tensors, spread over the modules; each is merged twice"
    accepted = ", ".join(map(str, made.accepted_ranks))
    snapped = f"; each is raised to the next of {accepted}" if accepted else ""
    if made.bytes_written is None:
        return f"known once the ranks are{snapped}"
    padded = "" if made.uniform_rank is None else f", every module padded to rank {made.uniform_rank}"
    return f"{format_bytes(made.bytes_written)} of tensors{padded}"
