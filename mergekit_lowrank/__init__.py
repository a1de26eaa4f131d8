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
    from mergekit_lowrank.api import MergedAdapter, finalize, merge, plan, plan_variants, verify
    from mergekit_lowrank.diagnostics import Diagnosis, Finding, ModuleDiagnosis, diagnose
    from mergekit_lowrank.engine import Plan
    from mergekit_lowrank.errors import (
        CheckpointError,
        DiskError,
        EvaluationError,
        IncompatibleInputsError,
        InterruptedMergeError,
        MemoryBudgetError,
        MergeError,
        OutputError,
        PluginError,
        RecipeError,
        StrategyError,
    )
    from mergekit_lowrank.evaluation import Evaluation, evaluate, load_tasks
    from mergekit_lowrank.events import (
        Event,
        MergeFailed,
        MergeFinished,
        MergeResumed,
        MergeStarted,
        ModuleMerged,
        Notice,
        Reporter,
        SurveyRound,
    )
    from mergekit_lowrank.executors import Executor, Job, Work
    from mergekit_lowrank.formats import Adapter, Checkpoint, Format, ModuleHeader
    from mergekit_lowrank.hookspecs import hookimpl
    from mergekit_lowrank.inspection import AdapterInfo, inspect
    from mergekit_lowrank.lowrank import DenseUpdate, InputUpdate, LowRankUpdate, StreamedUpdate, Update
    from mergekit_lowrank.progress import ProgressBar
    from mergekit_lowrank.recipe import Recipe, load_recipe
    from mergekit_lowrank.registry import Registry
    from mergekit_lowrank.report import MergeComparison, Report, compare_merges
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
    from mergekit_lowrank.verification import Fault, Verification

__all__ = [
    "Adapter",
    "AdapterInfo",
    "Checkpoint",
    "CheckpointError",
    "ConversionReport",
    "Coordinates",
    "DenseUpdate",
    "Diagnosis",
    "DiskError",
    "ElementwiseStrategy",
    "Evaluation",
    "EvaluationError",
    "Event",
    "Executor",
    "Fault",
    "Finding",
    "Format",
    "IncompatibleInputsError",
    "InputUpdate",
    "InterruptedMergeError",
    "Job",
    "LowRankUpdate",
    "MemoryBudgetError",
    "MergeComparison",
    "MergeContext",
    "MergeError",
    "MergeFailed",
    "MergeFinished",
    "MergeResumed",
    "MergeStarted",
    "MergedAdapter",
    "ModuleDiagnosis",
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
    "ProgressBar",
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
    "Verification",
    "Work",
    "__version__",
    "compare_merges",
    "convert",
    "diagnose",
    "evaluate",
    "extract",
    "finalize",
    "hookimpl",
    "inspect",
    "load_recipe",
    "load_tasks",
    "merge",
    "per_input",
    "plan",
    "plan_variants",
    "resize",
    "verify",
]

_ROOMS = {
    "api": ("MergedAdapter", "finalize", "merge", "plan", "plan_variants", "verify"),
    "diagnostics": ("Diagnosis", "Finding", "ModuleDiagnosis", "diagnose"),
    "engine": ("Plan",),
    "errors": (
        "CheckpointError",
        "DiskError",
        "EvaluationError",
        "IncompatibleInputsError",
        "InterruptedMergeError",
        "MemoryBudgetError",
        "MergeError",
        "OutputError",
        "PluginError",
        "RecipeError",
        "StrategyError",
    ),
    "evaluation": ("Evaluation", "evaluate", "load_tasks"),
    "events": (
        "Event",
        "MergeFailed",
        "MergeFinished",
        "MergeResumed",
        "MergeStarted",
        "ModuleMerged",
        "Notice",
        "Reporter",
        "SurveyRound",
    ),
    "executors": ("Executor", "Job", "Work"),
    "formats": ("Adapter", "Checkpoint", "Format", "ModuleHeader"),
    "hookspecs": ("hookimpl",),
    "inspection": ("AdapterInfo", "inspect"),
    "lowrank": ("DenseUpdate", "InputUpdate", "LowRankUpdate", "StreamedUpdate", "Update"),
    "progress": ("ProgressBar",),
    "recipe": ("Recipe", "load_recipe"),
    "registry": ("Registry",),
    "report": ("MergeComparison", "Report", "compare_merges"),
    "spaces": ("Coordinates", "ModuleShape", "Part", "Space", "SpaceParams"),
    "strategies": ("ElementwiseStrategy", "MergeContext", "Params", "Preset", "Strategy", "Survey", "per_input"),
    "transforms": ("ConversionReport", "convert", "extract", "resize"),
    "verification": ("Fault", "Verification"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
