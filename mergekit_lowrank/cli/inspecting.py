"""``inspect``: what a checkpoint holds, as tables."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import click

from mergekit_lowrank.cli.tables import aligned, fields, one_line
from mergekit_lowrank.engine import format_bytes
from mergekit_lowrank.inspection import AdapterInfo, ExtraInfo, ModuleInfo, inspect
from mergekit_lowrank.inspection.headers import kinds_text, ranks_text, scaling_text, span, types_text
from mergekit_lowrank.inspection.results import grouped, total_norm

__all__ = ["run_inspect"]

COLUMNS = ("modules", "kind", "count", "out x in", "rank", "scaling", "type")
MEASURES = ("norm", "stable rank", "effective rank")
EXTRA_COLUMNS = ("beside LoRA", "kind", "count", "shape", "type", "size")
LEGEND = (
    "norm: of the update, scaling * B * A, over all modules of a row (Frobenius)",
    "stable rank: norm^2 / largest singular value^2; effective rank: exp of the entropy of the singular values",
)
UNMEASURED = "-"
COLUMNS_OF_TEXT = 86
"""Of what stands behind the names of facts, so that a line has 100."""


def run_inspect(reference: str, *, as_json: bool) -> None:
    """Open a checkpoint, measure it module by module, and print what it holds."""
    info = inspect(reference)
    click.echo(json.dumps(info.to_dict(), indent=1) if as_json else "\n".join(_lines(info)))


def _lines(info: AdapterInfo) -> Iterator[str]:
    yield one_line(info.location)
    yield from fields(_wrapped([("format", info.format), *_facts(info)]), indent="  ")
    if info.modules:
        yield ""
        yield from _table(info)
    if info.extras:
        yield ""
        groups = grouped(info.extras, lambda extra: extra.group)
        yield from aligned(EXTRA_COLUMNS, map(_row_of_extras, groups), right=("count", "shape", "size"))
    if info.norm is not None:
        yield ""
        yield from LEGEND


def _facts(info: AdapterInfo) -> Iterator[tuple[str, str]]:
    yield "kind", info.kind
    yield "base model", info.base_model or "not named"
    if info.task_type:
        yield "task type", info.task_type
    if info.modules:
        yield from _facts_of_modules(info)
    if info.norm is not None:
        yield "update norm", f"{info.norm:.4g} over all modules"
    yield "beside LoRA", _extras_text(info.extras)
    yield from (("in a merge", line) for line in info.in_a_merge)


def _facts_of_modules(info: AdapterInfo) -> Iterator[tuple[str, str]]:
    yield "modules", kinds_text(module.kind for module in info.modules)
    if info.scaling_rule is not None:
        yield "rank", ranks_text(info.modules)
        yield "scaling", f"{scaling_text(info.modules)} ({info.scaling_rule})"
    yield "size", f"{format_bytes(info.stored_bytes)} in {types_text(info.modules)}"


def _wrapped(facts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The facts, each on as many lines as it takes."""
    for name, text in facts:
        lines = textwrap.wrap(one_line(text), COLUMNS_OF_TEXT, break_long_words=False, break_on_hyphens=False)
        yield from zip([name, *[""] * len(lines)], lines or [""], strict=False)


def _table(info: AdapterInfo) -> Iterator[str]:
    columns = COLUMNS if info.norm is None else (*COLUMNS, *MEASURES)
    rows = (_row(group)[: len(columns)] for group in grouped(info.modules, lambda module: module.group))
    yield from aligned(columns, rows, right=("count", "out x in", *MEASURES))


def _row(modules: Sequence[ModuleInfo]) -> tuple[str, ...]:
    name, kind, d_out, d_in = modules[0].group
    return (
        name,
        kind,
        str(len(modules)),
        f"{d_out} x {d_in}",
        ranks_text(modules),
        scaling_text(modules),
        types_text(modules),
        f"{total_norm(modules):.4g}",
        _span_of(module.stable_rank for module in modules),
        _span_of(module.effective_rank for module in modules),
    )


def _span_of(numbers: Iterable[float | None]) -> str:
    known = [number for number in numbers if number is not None]
    return span(known, ".3g") if known else UNMEASURED


def _row_of_extras(extras: Sequence[ExtraInfo]) -> tuple[str, ...]:
    name, kind, shape = extras[0].group
    types = ", ".join(dict.fromkeys(extra.dtype for extra in extras))
    size = format_bytes(sum(extra.stored_bytes for extra in extras))
    return name, kind, str(len(extras)), " x ".join(map(str, shape)), types, size


def _extras_text(extras: Sequence[ExtraInfo]) -> str:
    if not extras:
        return "nothing"
    size = format_bytes(sum(extra.stored_bytes for extra in extras))
    return f"{kinds_text(extra.kind for extra in extras)}: {size}"
