"""``inspect``: what a checkpoint holds, how concentrated its updates are, and what a merge makes of it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import torch

from mergekit_lowrank.cli.headers import (
    counted,
    kind_of,
    kind_of_checkpoint,
    kinds_text,
    ranks_text,
    scaling_rule,
    scaling_text,
    span,
    type_name,
    types_text,
)
from mergekit_lowrank.cli.tables import aligned, fields, one_line
from mergekit_lowrank.engine import format_bytes, open_checkpoint
from mergekit_lowrank.formats import Checkpoint, Extra, Format, ModuleHeader, WholeModel
from mergekit_lowrank.lowrank import LowRankUpdate, Spectrum, norm, spectrum_of
from mergekit_lowrank.recipe import resolve_model
from mergekit_lowrank.registry import Registry

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
Grouped = TypeVar("Grouped")


@dataclass(frozen=True)
class _Measured:
    """One module: its header, and the size of its update; None where that is not known.

    Attributes:
        header: of the module.
        norm: ‖ΔW‖_F.
        stable_rank: ‖ΔW‖²_F / σ₁², between 1 and the rank (Rudelson & Vershynin 2007, arXiv:math/0503442); 0 of a
            zero update, None of one that has no factors.
        effective_rank: exp(−Σ p·ln p) with p = σ / Σσ (Roy & Vetterli 2007, EUSIPCO); the same.
    """

    header: ModuleHeader
    norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None

    @property
    def kind(self) -> tuple[str, str, int, int]:
        """What rows are made of: the name behind the last number (the layer), the kind and the shape."""
        return _tail(self.header.name), kind_of(self.header), self.header.d_out, self.header.d_in


def run_inspect(reference: str, *, as_json: bool) -> None:
    """Open a checkpoint, measure it module by module, and print what it holds."""
    registry, path = Registry.load(), resolve_model(reference, Path.cwd())
    checkpoint = open_checkpoint(path, registry, label=path.resolve().name)
    kind = next(format_class for format_class in registry.formats.values() if format_class().recognises(path))
    measured = [_measured(checkpoint, header) for header in checkpoint.modules.values()]
    if as_json:
        click.echo(json.dumps(_as_dict(reference, kind, checkpoint, measured), indent=1))
    else:
        click.echo("\n".join(_lines(reference, kind, checkpoint, measured)))


def _measured(checkpoint: Checkpoint, header: ModuleHeader) -> _Measured:
    """The module, measured from the r x r core of its factors; by its header alone where only a base gives updates."""
    if checkpoint.needs_base is not None or isinstance(checkpoint, WholeModel):
        return _Measured(header)
    update = checkpoint.read(header.name)
    if not isinstance(update, LowRankUpdate):
        return _Measured(header, norm(update))
    wide = update.to("cpu", torch.float64)
    spectrum = spectrum_of(wide)
    return _Measured(header, norm(wide), _stable_rank(spectrum), _effective_rank(spectrum))


def _stable_rank(spectrum: Spectrum) -> float:
    return spectrum.energy / float(spectrum.values[0]) ** 2 if spectrum.energy else 0.0


def _effective_rank(spectrum: Spectrum) -> float:
    if not spectrum.energy:
        return 0.0
    shares = spectrum.values / spectrum.values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def _lines(reference: str, kind: type[Format], checkpoint: Checkpoint, measured: Sequence[_Measured]) -> Iterator[str]:
    yield one_line(reference)
    yield from fields(_wrapped([("format", kind.name), *_facts(checkpoint, measured)]), indent="  ")
    if measured:
        yield ""
        yield from _table(measured)
    if checkpoint.extras:
        yield ""
        groups = _grouped(checkpoint.extras.values(), _kind_of_extra)
        yield from aligned(EXTRA_COLUMNS, map(_row_of_extras, groups), right=("count", "shape", "size"))
    if _is_measured(measured):
        yield ""
        yield from LEGEND


def _facts(checkpoint: Checkpoint, measured: Sequence[_Measured]) -> Iterator[tuple[str, str]]:
    headers = [module.header for module in measured]
    yield "kind", kind_of_checkpoint(checkpoint)
    yield "base model", checkpoint.base_model or "not named"
    if checkpoint.task_type:
        yield "task type", checkpoint.task_type
    if headers:
        yield from _facts_of_modules(headers, checkpoint)
    if _is_measured(measured):
        yield "update norm", f"{_total(measured):.4g} over all modules"
    yield "beside LoRA", _extras_text(checkpoint)
    yield from (("in a merge", line) for line in _in_a_merge(checkpoint))


def _facts_of_modules(headers: Sequence[ModuleHeader], checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    yield "modules", kinds_text(map(kind_of, headers))
    if not isinstance(checkpoint, WholeModel):
        yield "rank", ranks_text(headers)
        yield "scaling", f"{scaling_text(headers)} ({scaling_rule(checkpoint.config)})"
    yield "size", f"{format_bytes(sum(h.stored_bytes for h in headers))} in {types_text(headers)}"


def _wrapped(facts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The facts, each on as many lines as it takes."""
    for name, text in facts:
        lines = textwrap.wrap(one_line(text), COLUMNS_OF_TEXT, break_long_words=False, break_on_hyphens=False)
        yield from zip([name, *[""] * len(lines)], lines or [""], strict=False)


def _in_a_merge(checkpoint: Checkpoint) -> Iterator[str]:
    """What a merge would do with each part, a sentence for each."""
    headers = checkpoint.modules.values()
    factored = sum(not header.is_dense for header in headers)
    if isinstance(checkpoint, WholeModel):
        changes = counted(len(headers), "difference")
        yield f"{changes} to its base {_are(len(headers))} merged; the recipe needs base_model"
    elif checkpoint.needs_base is not None:
        yield f"{counted(len(headers), 'module')}; the recipe needs base_model: {checkpoint.needs_base}"
    else:
        dense = len(headers) - factored
        if factored:
            yield f"{counted(factored, 'module')} {_are(factored)} merged as factors, without the base model"
        if dense:
            yield f"{counted(dense, 'module')} without factors (biases of lora_B) {_are(dense)} merged entry by entry"
    if checkpoint.extras:
        yield (
            f"{kinds_text(map(_word_for, checkpoint.extras.values()))}: refused unless the recipe says what becomes of "
            "them, with extras: average, delta, {from: MODEL} or {from: base_model}"
        )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _table(measured: Sequence[_Measured]) -> Iterator[str]:
    columns = (*COLUMNS, *MEASURES) if _is_measured(measured) else COLUMNS
    rows = (_row(group)[: len(columns)] for group in _grouped(measured, lambda module: module.kind))
    yield from aligned(columns, rows, right=("count", "out x in", *MEASURES))


def _row(modules: Sequence[_Measured]) -> tuple[str, ...]:
    name, kind, d_out, d_in = modules[0].kind
    headers = [module.header for module in modules]
    return (
        name,
        kind,
        str(len(modules)),
        f"{d_out} x {d_in}",
        ranks_text(headers),
        scaling_text(headers),
        types_text(headers),
        f"{_total(modules):.4g}",
        _span_of(module.stable_rank for module in modules),
        _span_of(module.effective_rank for module in modules),
    )


def _span_of(numbers: Iterable[float | None]) -> str:
    known = [number for number in numbers if number is not None]
    return span(known, ".3g") if known else UNMEASURED


def _row_of_extras(extras: Sequence[Extra]) -> tuple[str, ...]:
    name, kind, shape = _kind_of_extra(extras[0])
    types = ", ".join(dict.fromkeys(type_name(extra.dtype) for extra in extras))
    size = format_bytes(sum(map(_bytes_of, extras)))
    return name, kind, str(len(extras)), " x ".join(map(str, shape)), types, size


def _kind_of_extra(extra: Extra) -> tuple[str, str, tuple[int, ...]]:
    """What rows are made of: the name behind the last number, the kind and the shape."""
    return _tail(extra.name), _word_for(extra), extra.shape


def _word_for(extra: Extra) -> str:
    if extra.in_side_file:
        return "side tensor"
    if extra.tokens is not None:
        return "block of token rows"
    if extra.saved_under is not None:
        return "saved module"
    return "bias" if extra.name.endswith(".bias") else "whole parameter"


def _extras_text(checkpoint: Checkpoint) -> str:
    extras = checkpoint.extras.values()
    if not extras:
        return "nothing"
    return f"{kinds_text(map(_word_for, extras))}: {format_bytes(sum(map(_bytes_of, extras)))}"


def _bytes_of(extra: Extra) -> int:
    return extra.dtype.itemsize * math.prod(extra.shape)


def _tail(name: str) -> str:
    """The name behind the last number, which is that of the layer."""
    return re.split(r"\.\d+\.", name)[-1]


def _grouped(items: Iterable[Grouped], key: Callable[[Grouped], object]) -> Iterable[list[Grouped]]:
    groups: dict[object, list[Grouped]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.values()


def _is_measured(measured: Sequence[_Measured]) -> bool:
    return any(module.norm is not None for module in measured)


def _total(measured: Sequence[_Measured]) -> float:
    return math.hypot(*(module.norm for module in measured if module.norm is not None))


def _as_dict(
    reference: str, kind: type[Format], checkpoint: Checkpoint, measured: Sequence[_Measured]
) -> dict[str, object]:
    return {
        "location": reference,
        "format": kind.name,
        "kind": kind_of_checkpoint(checkpoint),
        "base_model": checkpoint.base_model,
        "revision": checkpoint.revision,
        "task_type": checkpoint.task_type,
        "fan_in_fan_out": checkpoint.fan_in_fan_out,
        "scaling_rule": None if isinstance(checkpoint, WholeModel) else scaling_rule(checkpoint.config),
        "needs_base": checkpoint.needs_base,
        "in_a_merge": list(_in_a_merge(checkpoint)),
        "files": [str(path) for path in checkpoint.files],
        "stored_bytes": sum(module.header.stored_bytes for module in measured),
        "norm": _total(measured) if _is_measured(measured) else None,
        "modules": [_module(module) for module in measured],
        "extras": [_extra(extra) for extra in checkpoint.extras.values()],
    }


def _module(measured: _Measured) -> dict[str, object]:
    header = measured.header
    return {
        "module": header.name,
        "kind": kind_of(header),
        "d_out": header.d_out,
        "d_in": header.d_in,
        "rank": header.rank,
        "scaling": header.scaling,
        "dtype": type_name(header.dtype),
        "stored_bytes": header.stored_bytes,
        "norm": measured.norm,
        "stable_rank": measured.stable_rank,
        "effective_rank": measured.effective_rank,
    }


def _extra(extra: Extra) -> dict[str, object]:
    return {
        "name": extra.name,
        "key": extra.key,
        "kind": _word_for(extra),
        "shape": list(extra.shape),
        "dtype": type_name(extra.dtype),
        "stored_bytes": _bytes_of(extra),
        "tokens": None if extra.tokens is None else list(extra.tokens),
    }
