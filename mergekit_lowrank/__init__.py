"""Merge low-rank adapters (LoRA) exactly, one module at a time, in bounded memory.

::

    from mergekit_lowrank import merge

    merge("recipe.yaml", "merged/")                  # a directory that peft, vLLM and llama.cpp load
    adapter = merge({"merge_method": "robustmerge", "models": [...]})  # in memory

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergekit_lowrank._version import __version__

if TYPE_CHECKING:
    from mergekit_lowrank.api import MergedAdapter, finalize, merge, plan, plan_variants
    from mergekit_lowrank.engine import Plan
    from mergekit_lowrank.errors import (
        CheckpointError,
        DiskError,
        IncompatibleInputsError,
        InterruptedMergeError,
        MemoryBudgetError,
        MergeError,
        OutputError,
        PluginError,
        RecipeError,
        StrategyError,
    )
    from mergekit_lowrank.events import Event, MergeFinished, MergeStarted, ModuleMerged, Notice, Reporter, SurveyRound
    from mergekit_lowrank.executors import Executor, Job, Work
    from mergekit_lowrank.formats import Adapter, Checkpoint, Format, ModuleHeader
    from mergekit_lowrank.hookspecs import hookimpl
    from mergekit_lowrank.lowrank import DenseUpdate, InputUpdate, LowRankUpdate, StreamedUpdate, Update
    from mergekit_lowrank.recipe import Recipe, load_recipe
    from mergekit_lowrank.registry import Registry
    from mergekit_lowrank.report import Report
    from mergekit_lowrank.spaces import Coordinates, ModuleShape, Part, Space, SpaceParams
    from mergekit_lowrank.strategies import (
        ElementwiseStrategy,
        MergeContext,
        Params,
        Preset,
        Strategy,
        Survey,
        per_input,
    )
    from mergekit_lowrank.transforms import ConversionReport, convert, extract, resize

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "ConversionReport",
    "Coordinates",
    "DenseUpdate",
    "DiskError",
    "ElementwiseStrategy",
    "Event",
    "Executor",
    "Format",
    "IncompatibleInputsError",
    "InputUpdate",
    "InterruptedMergeError",
    "Job",
    "LowRankUpdate",
    "MemoryBudgetError",
    "MergeContext",
    "MergeError",
    "MergeFinished",
    "MergeStarted",
    "MergedAdapter",
    "ModuleHeader",
    "ModuleMerged",
    "ModuleShape",
    "Notice",
    "OutputError",
    "Params",
    "Part",
    "Plan",
    "PluginError",
    "Preset",
    "Recipe",
    "RecipeError",
    "Registry",
    "Report",
    "Reporter",
    "Space",
    "SpaceParams",
    "Strategy",
    "StrategyError",
    "StreamedUpdate",
    "Survey",
    "SurveyRound",
    "Update",
    "Work",
    "__version__",
    "convert",
    "extract",
    "finalize",
    "hookimpl",
    "load_recipe",
    "merge",
    "per_input",
    "plan",
    "plan_variants",
    "resize",
]

_ROOMS = {
    "api": ("MergedAdapter", "finalize", "merge", "plan", "plan_variants"),
    "engine": ("Plan",),
    "errors": (
        "CheckpointError",
        "DiskError",
        "IncompatibleInputsError",
        "InterruptedMergeError",
        "MemoryBudgetError",
        "MergeError",
        "OutputError",
        "PluginError",
        "RecipeError",
        "StrategyError",
    ),
    "events": ("Event", "MergeFinished", "MergeStarted", "ModuleMerged", "Notice", "Reporter", "SurveyRound"),
    "executors": ("Executor", "Job", "Work"),
    "formats": ("Adapter", "Checkpoint", "Format", "ModuleHeader"),
    "hookspecs": ("hookimpl",),
    "lowrank": ("DenseUpdate", "InputUpdate", "LowRankUpdate", "StreamedUpdate", "Update"),
    "recipe": ("Recipe", "load_recipe"),
    "registry": ("Registry",),
    "report": ("Report",),
    "spaces": ("Coordinates", "ModuleShape", "Part", "Space", "SpaceParams"),
    "strategies": ("ElementwiseStrategy", "MergeContext", "Params", "Preset", "Strategy", "Survey", "per_input"),
    "transforms": ("ConversionReport", "convert", "extract", "resize"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
