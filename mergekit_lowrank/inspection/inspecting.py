"""A checkpoint, opened and measured module by module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.formats import Adapter, Checkpoint, Extra, ModuleHeader, PeftFormat, WholeModel
from mergekit_lowrank.inspection.headers import (
    counted,
    kind_of,
    kind_of_checkpoint,
    kinds_text,
    scaling_rule,
    type_name,
)
from mergekit_lowrank.inspection.results import AdapterInfo, ExtraInfo, ModuleInfo, total_norm
from mergekit_lowrank.lowrank import LowRankUpdate, Spectrum, norm, spectrum_of
from mergekit_lowrank.recipe import resolve_model
from mergekit_lowrank.registry import Registry

__all__ = ["inspect"]


def inspect(reference: str | Path | Adapter, *, registry: Registry | None = None) -> AdapterInfo:
    """What a checkpoint holds: modules, ranks, scaling, the size of its update, and what a merge makes of each part.

    Tensors are read one module after the other; those of whole models, and of adapters whose updates only their base
    gives, are not read.

    Args:
        reference: a path, or a repository on the Hugging Face Hub as in a recipe; or an adapter in memory.
        registry: what there is to read it with; by default the built-ins and every installed plugin.

    Raises:
        RecipeError: there is no such path or repository.
        CheckpointError: no format recognises it, or it is damaged or holds something that nothing handles.
    """
    location, format_name, checkpoint = _opened(reference, registry)
    modules = tuple(_measured(checkpoint, header) for header in checkpoint.modules.values())
    extras = tuple(map(_extra, checkpoint.extras.values()))
    is_measured = any(module.norm is not None for module in modules)
    return AdapterInfo(
        location=location,
        format=format_name,
        kind=kind_of_checkpoint(checkpoint),
        base_model=checkpoint.base_model,
        revision=checkpoint.revision,
        task_type=checkpoint.task_type,
        fan_in_fan_out=checkpoint.fan_in_fan_out,
        scaling_rule=None if isinstance(checkpoint, WholeModel) else scaling_rule(checkpoint.config),
        needs_base=checkpoint.needs_base,
        in_a_merge=tuple(_in_a_merge(checkpoint, extras)),
        files=tuple(map(str, checkpoint.files)),
        stored_bytes=sum(module.stored_bytes for module in modules),
        norm=total_norm(modules) if is_measured else None,
        modules=modules,
        extras=extras,
    )


def _opened(reference: str | Path | Adapter, registry: Registry | None) -> tuple[str, str, Checkpoint]:
    """What it is called, its format, and itself."""
    if isinstance(reference, Adapter):
        checkpoint = reference.open(label="adapter")
        return checkpoint.location, PeftFormat.name, checkpoint
    known, path = registry or Registry.load(), resolve_model(str(reference), Path.cwd())
    checkpoint = open_checkpoint(path, known, label=path.resolve().name)
    kind = next(format_class for format_class in known.formats.values() if format_class().recognises(path))
    return str(reference), kind.name, checkpoint


def _measured(checkpoint: Checkpoint, header: ModuleHeader) -> ModuleInfo:
    """The module, measured from the r x r core of its factors; by its header alone where only a base gives updates."""
    if checkpoint.needs_base is not None or isinstance(checkpoint, WholeModel):
        return _module(header)
    update = checkpoint.read(header.name)
    if not isinstance(update, LowRankUpdate):
        return _module(header, norm(update))
    wide = update.to("cpu", torch.float64)
    spectrum = spectrum_of(wide)
    return _module(header, norm(wide), _stable_rank(spectrum), _effective_rank(spectrum))


def _module(header: ModuleHeader, *measures: float) -> ModuleInfo:
    return ModuleInfo(
        header.name,
        kind_of(header),
        header.d_out,
        header.d_in,
        header.rank,
        header.scaling,
        type_name(header.dtype),
        header.stored_bytes,
        *measures,
    )


def _stable_rank(spectrum: Spectrum) -> float:
    return spectrum.energy / float(spectrum.values[0]) ** 2 if spectrum.energy else 0.0


def _effective_rank(spectrum: Spectrum) -> float:
    if not spectrum.energy:
        return 0.0
    shares = spectrum.values / spectrum.values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def _extra(extra: Extra) -> ExtraInfo:
    stored_bytes = extra.dtype.itemsize * math.prod(extra.shape)
    return ExtraInfo(
        extra.name, extra.key, _word_for(extra), extra.shape, type_name(extra.dtype), stored_bytes, extra.tokens
    )


def _word_for(extra: Extra) -> str:
    if extra.in_side_file:
        return "side tensor"
    if extra.tokens is not None:
        return "block of token rows"
    if extra.saved_under is not None:
        return "saved module"
    return "bias" if extra.name.endswith(".bias") else "whole parameter"


def _in_a_merge(checkpoint: Checkpoint, extras: tuple[ExtraInfo, ...]) -> Iterator[str]:
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
    if extras:
        yield (
            f"{kinds_text(extra.kind for extra in extras)}: refused unless the recipe says what becomes of "
            "them, with extras: average, delta, {from: MODEL} or {from: base_model}"
        )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
