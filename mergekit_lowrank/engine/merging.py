"""One module: read → encode → merge → decode → scale → rank → cast → checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lowrank.engine.devices import Device
from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.engine.records import ModuleRecord, record_of
from mergekit_lowrank.errors import MergeError, OutputError, StrategyError
from mergekit_lowrank.formats import DTYPES
from mergekit_lowrank.lowrank import (
    DenseUpdate,
    InputUpdate,
    LowRankUpdate,
    Update,
    canonical,
    scratch_space,
)
from mergekit_lowrank.policies import Scaling
from mergekit_lowrank.registry import BUILT_IN
from mergekit_lowrank.spaces import Coordinates
from mergekit_lowrank.strategies import MergeContext, Survey, keyed_generator

__all__ = [
    "Encodings",
    "MergedInputs",
    "MergedModule",
    "blamed",
    "context_of",
    "encoding_key",
    "merge_inputs",
    "merge_module",
    "on_disk",
    "rank_generator",
    "read_updates",
]

SCRATCH_ABOVE_BYTES = 1 << 20
"""Smaller matrices stay in memory: they are less than what is allowed for itself to each worker."""


@dataclass(frozen=True, eq=False)
class MergedModule:
    """One module's result.

    Attributes:
        name: the module.
        update: as it is to be stored: factors on the CPU in the stored type with all scaling in b; for a fold into the
            base, and of a tensor without factors, the update itself, on the device in the compute type.
        artefacts: what the strategy returned beside it, by name.
        record: for the report.
    """

    name: str
    update: Update
    artefacts: Mapping[str, Tensor]
    record: ModuleRecord


@dataclass(frozen=True, eq=False)
class MergedInputs:
    """One module's inputs merged and scaled, not yet cut to a rank.

    Attributes:
        update: the result.
        scaling: what made it as large as it is.
        inputs: what it was made from, in the compute type.
        artefacts: what goes beside it, given what was written of it.
    """

    update: Update
    scaling: Scaling
    inputs: tuple[InputUpdate, ...]
    artefacts: Callable[[LowRankUpdate], Mapping[str, Tensor]]


class Encodings:
    """The coordinates of one module's inputs, for as many merges of them as there are.

    What is made for one merge is kept until a merge needs another form or space: in the order of ``encoding_key`` each
    decomposition is made once, and never two of them are held.

    Args:
        stored: the inputs as read.
        device: where they are merged.
        are_kept: whether there are several merges; else nothing is held for the next one.
    """

    def __init__(self, stored: Sequence[InputUpdate], device: Device, *, are_kept: bool = False) -> None:
        self._stored, self._device, self._are_kept = stored, device, are_kept
        self._form: Hashable = None
        self._updates: list[InputUpdate] = []
        self._key: Hashable = None
        self._coordinates: Coordinates | None = None

    @property
    def device(self) -> torch.device:
        """Where they are merged, as torch knows it."""
        return self._device.torch

    def of(self, plan: Plan, module: ModulePlan) -> Coordinates:
        """Those that the plan asks for, with the weights of the module."""
        space, key = module.group.space, encoding_key(plan, module)
        if not self._are_kept:
            return space.encode(self._in_form(plan), module.weights)
        if self._coordinates is None or self._key != key:
            self._coordinates = None  # before the next are made
            self._key, self._coordinates = key, space.encode(self._in_form(plan), module.weights)
        if self._coordinates.weights != module.weights:
            return space.reweighted(self._coordinates, module.weights)
        return self._coordinates

    def _in_form(self, plan: Plan) -> list[InputUpdate]:
        """The inputs on the device in the compute type, canonical where the recipe asks for it."""
        form = _form(plan)
        if self._updates and self._form == form:
            return self._updates
        self._updates = []
        updates = self._device.upload(self._stored, plan.compute_dtype)
        if plan.recipe.canonical:
            updates = [canonical(u) if isinstance(u, LowRankUpdate) else u for u in updates]
        if self._are_kept:
            self._form, self._updates = form, updates
        return updates


def on_disk(directory: Path, scratch_bytes: int) -> AbstractContextManager[None]:
    """Within it large matrices of a module lie in a file, where the plan counts on that.

    Args:
        directory: of the file, which has no name in it.
        scratch_bytes: of the module's plan.
    """
    return scratch_space(directory, SCRATCH_ABOVE_BYTES) if scratch_bytes else nullcontext()


def _form(plan: Plan) -> tuple[str, str]:
    return str(plan.compute_dtype), plan.recipe.canonical or ""


def encoding_key(plan: Plan, module: ModulePlan) -> tuple[str, ...]:
    """Equal for merges that share coordinates; in its order those that share a form of the inputs are neighbours."""
    space = module.group.space
    return (*_form(plan), space.name, space.params.model_dump_json())


@contextmanager
def blamed(module: ModulePlan) -> Iterator[None]:
    """Name strategy, plugin and module in whatever a plugin raises; what a built-in raises is a bug and stays one."""
    try:
        yield
    except MergeError as error:
        raise type(error)(f"{_who(module)} on module '{module.name}': {error}") from error
    except Exception as error:
        if module.group.owner == BUILT_IN:
            raise
        message = f"{_who(module)} failed on module '{module.name}': {type(error).__name__}: {error}"
        raise StrategyError(message) from error


def _who(module: ModulePlan) -> str:
    """The strategy, and the plugin it came from."""
    group = module.group
    return f"strategy '{group.method}'" + ("" if group.owner == BUILT_IN else f" of plugin '{group.owner}'")


def read_updates(plan: Plan, module: ModulePlan) -> list[InputUpdate]:
    """The participants' updates as stored, on the CPU; dense ones are read when they are merged."""
    return [plan.inputs[t].read(module.name) for t in module.participants]


def context_of(plan: Plan, module: ModulePlan, survey: Survey | None) -> MergeContext:
    """What the strategy may know of the module."""
    return MergeContext(
        module=module.name,
        participants=module.participants,
        weights=module.weights,
        total_weight=module.total_weight,
        input_params=tuple(module.group.input_params[t] for t in module.participants),
        survey=survey,
        seed=plan.recipe.seed,
        labels=tuple(plan.inputs[t].label for t in module.participants),
    )


def merge_inputs(plan: Plan, module: ModulePlan, encodings: Encodings, survey: Survey | None) -> MergedInputs:
    """The merged update of one module, as large as its scale policy makes it.

    Raises:
        StrategyError: the strategy gave a wrong shape or values that are not finite.
    """
    strategy = module.group.strategy
    context = context_of(plan, module, survey)
    with blamed(module):
        coordinates = encodings.of(plan, module)
        merged = strategy.merge(coordinates, context)
    _check(merged, module)
    scaling = module.scale.scaling(merged, coordinates.updates, module.weights)
    # Coordinates are let go here unless artefacts need them.
    artefacts = (
        _artefact_maker(module, coordinates, scaling.factor, context) if strategy.has_artefacts() else lambda _: {}
    )
    return MergedInputs(merged.scaled(scaling.factor), scaling, coordinates.updates, artefacts)


def _artefact_maker(
    module: ModulePlan, coordinates: Coordinates, scale: float, context: MergeContext
) -> Callable[[LowRankUpdate], Mapping[str, Tensor]]:
    def make(written: LowRankUpdate) -> Mapping[str, Tensor]:
        with blamed(module):
            found = module.group.strategy.artefacts(coordinates, written, scale, context)
            _check_artefacts(found)
        return {name: tensor.cpu() for name, tensor in found.items()}

    return make


def _check_artefacts(found: Any) -> None:
    if not isinstance(found, Mapping):
        raise StrategyError(f"artefacts returned a {type(found).__name__}; expected a mapping of names to tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise StrategyError(f"artefact {name!r} is a {type(tensor).__name__}; expected a tensor under a text")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            kind = f"{tensor.layout} of {tensor.dtype}".replace("torch.", "")
            raise StrategyError(f"artefact '{name}' is {kind}, which safetensors cannot hold; make it dense and real")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise StrategyError(f"artefact '{name}' holds values that are not finite")


def rank_generator(plan: Plan, module: ModulePlan) -> torch.Generator:
    """Where the decomposition of a large dense result starts: the same each time the module is merged."""
    return keyed_generator(plan.recipe.seed, module.name, "rank")


def merge_module(plan: Plan, module: ModulePlan, encodings: Encodings, survey: Survey | None) -> MergedModule:
    """The merged module.

    Raises:
        StrategyError: the strategy gave a wrong shape or values that are not finite.
        RecipeError: its rank depends on the data and is above those that may be written.
        OutputError: the stored type cannot hold the result.
    """
    start = time.perf_counter()
    merged = merge_inputs(plan, module, encodings, survey)
    compressed = module.rank.compress(merged.update, rank_generator(plan, module))
    stored = written = compressed.update
    if not plan.folds and module.is_factored:
        factors = _stored(_as_adapter(plan, module, compressed.factors), module, plan.out_dtype)
        stored, written = factors, factors.to(encodings.device, plan.compute_dtype)
    record = record_of(plan, module, merged.inputs, compressed, written, merged.scaling, start)
    artefacts = merged.artefacts(written) if isinstance(written, LowRankUpdate) else {}
    return MergedModule(module.name, stored, artefacts, record)


def _as_adapter(plan: Plan, module: ModulePlan, update: LowRankUpdate) -> LowRankUpdate:
    plan.accepted(update.rank, module.name)  # or nothing of it is written
    return canonical(update) if plan.recipe.output.balance else update


def _check(merged: Update, module: ModulePlan) -> None:
    expected = (module.shape.d_out, module.shape.d_in)
    who = f"{_who(module)} on module '{module.name}'"
    if not isinstance(merged, LowRankUpdate | DenseUpdate) or merged.shape != expected:
        found = f"shape {merged.shape}" if isinstance(merged, LowRankUpdate | DenseUpdate) else f"{merged!r}"
        raise StrategyError(f"{who} returned {found}; expected an update of shape {expected}")
    tensors = [merged.delta] if isinstance(merged, DenseUpdate) else [merged.b, merged.a]
    if not all(_is_finite(tensor) for tensor in tensors):
        raise StrategyError(f"{who} returned values that are not finite. The inputs are finite, so this is its fault.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates, and no mask is made
    return math.isfinite(low) and math.isfinite(high)


def _stored(update: LowRankUpdate, module: ModulePlan, dtype: torch.dtype) -> LowRankUpdate:
    """The factors on the CPU in the stored type, all scaling in b: one rounding each."""
    if not (_is_finite(update.b) and _is_finite(update.a)):
        raise StrategyError(f"module '{module.name}': the decomposition of the merged update is not finite")
    b, a = update.b.cpu(), update.a.cpu().to(dtype)
    b = b.to(dtype) if update.scaling == 1 else (b.double() * update.scaling).to(dtype)
    if not (_is_finite(b) and _is_finite(a)):
        name = str(dtype).removeprefix("torch.")
        raise OutputError(
            f"module '{module.name}': the merged factors exceed the range of {name}; "
            "set out_dtype: bfloat16 or float32, or a smaller scale"
        )
    return LowRankUpdate(b, a)
