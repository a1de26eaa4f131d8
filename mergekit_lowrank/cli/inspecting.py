"""``inspect``: what one adapter holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mergekit_lowrank.cli.headers import ranks_text, scaling_text, type_name, types_text
from mergekit_lowrank.cli.tables import aligned, fields, one_line
from mergekit_lowrank.engine import format_bytes, open_checkpoint
from mergekit_lowrank.formats import Checkpoint, Format, ModuleHeader
from mergekit_lowrank.lowrank import norm
from mergekit_lowrank.recipe import resolve_model
from mergekit_lowrank.registry import Registry

__all__ = ["run_inspect"]

COLUMNS = ("modules", "count", "out x in", "rank", "scaling", "type", "norm")


@dataclass(frozen=True)
class _Measured:
    """One module: its header, and the Frobenius norm of its update."""

    header: ModuleHeader
    norm: float

    @property
    def kind(self) -> tuple[str, int, int]:
        """What rows are made of: the name behind the last number (the layer), and the shape."""
        return re.split(r"\.\d+\.", self.header.name)[-1], self.header.d_out, self.header.d_in


def run_inspect(reference: str, *, as_json: bool) -> None:
    """Open an adapter, measure it module by module, and print what it holds."""
    registry, path = Registry.load(), resolve_model(reference, Path.cwd())
    checkpoint = open_checkpoint(path, registry, label=path.resolve().name)
    kind = next(format_class for format_class in registry.formats.values() if format_class().recognises(path))
    measured = [_Measured(header, norm(checkpoint.read(name))) for name, header in checkpoint.modules.items()]
    if as_json:
        click.echo(json.dumps(_as_dict(reference, kind, checkpoint, measured), indent=1))
    else:
        click.echo("\n".join(_lines(reference, kind, checkpoint, measured)))


def _lines(reference: str, kind: type[Format], checkpoint: Checkpoint, measured: Sequence[_Measured]) -> Iterator[str]:
    yield one_line(reference)
    yield from fields([("format", f"{kind.name} ({kind.summary})"), *_facts(checkpoint, measured)], indent="  ")
    yield ""
    kinds: dict[tuple[str, int, int], list[_Measured]] = {}
    for module in measured:
        kinds.setdefault(module.kind, []).append(module)
    yield from aligned(COLUMNS, map(_row, kinds.values()), right=("count", "out x in", "norm"))
    yield ""
    yield "norm: of the update, scaling * B * A, over all modules of a row (Frobenius)"


def _facts(checkpoint: Checkpoint, measured: Sequence[_Measured]) -> Iterator[tuple[str, str]]:
    headers = [module.header for module in measured]
    yield "base model", checkpoint.base_model or "not named"
    if checkpoint.task_type:
        yield "task type", checkpoint.task_type
    yield "modules", f"{len(headers)}, rank {ranks_text(headers)}, scaling {scaling_text(headers)}"
    yield "size", f"{format_bytes(sum(h.stored_bytes for h in headers))} in {types_text(headers)}"
    yield "update norm", f"{_total(measured):.4g} over all modules"
    yield "beside LoRA", "nothing"


def _row(modules: Sequence[_Measured]) -> tuple[str, ...]:
    name, d_out, d_in = modules[0].kind
    headers = [module.header for module in modules]
    return (
        name,
        str(len(modules)),
        f"{d_out} x {d_in}",
        ranks_text(headers),
        scaling_text(headers),
        types_text(headers),
        f"{_total(modules):.4g}",
    )


def _total(measured: Sequence[_Measured]) -> float:
    return math.hypot(*(module.norm for module in measured))


def _as_dict(
    reference: str, kind: type[Format], checkpoint: Checkpoint, measured: Sequence[_Measured]
) -> dict[str, object]:
    return {
        "location": reference,
        "format": kind.name,
        "base_model": checkpoint.base_model,
        "revision": checkpoint.revision,
        "task_type": checkpoint.task_type,
        "fan_in_fan_out": checkpoint.fan_in_fan_out,
        "files": [str(path) for path in checkpoint.files],
        "stored_bytes": sum(module.header.stored_bytes for module in measured),
        "norm": _total(measured),
        "modules": [_module(module) for module in measured],
    }


def _module(measured: _Measured) -> dict[str, object]:
    header = measured.header
    return {
        "module": header.name,
        "d_out": header.d_out,
        "d_in": header.d_in,
        "rank": header.rank,
        "scaling": header.scaling,
        "dtype": type_name(header.dtype),
        "stored_bytes": header.stored_bytes,
        "norm": measured.norm,
    }
