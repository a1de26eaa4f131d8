"""What an output directory holds beside tensors: configuration, card, recipe, report, manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_lowrank.engine import Outcome, Plan
from mergekit_lowrank.formats import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TIMINGS_NAME,
    WORK_DIRECTORY,
    config_text,
    output_config,
    write_text,
    writing,
)
from mergekit_lowrank.recipe import Execution, Recipe
from mergekit_lowrank.report.card import model_card
from mergekit_lowrank.report.manifest import Digests, build_manifest
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.strategies import Preset

__all__ = ["adapter_config", "index_of", "write_texts"]


def write_texts(
    directory: Path, output: Path, outcome: Outcome, report: Report, method: Preset, digests: Digests
) -> None:
    """Write what belongs beside the tensors of an output.

    Args:
        directory: where it is being made.
        output: where it will lie; paths in the recipe are written from there.
        outcome: of the merge.
        report: of it.
        method: that of the recipe.
        digests: of the source files; empty under ``--no-hash``.

    Raises:
        OutputError: the disk is full or failed.
    """
    texts = {
        "README.md": model_card(outcome.plan, report, method, digests),
        "recipe.yaml": _relative_to(output, outcome.plan).to_yaml(),
        "report.json": report.to_json(),
    }
    if not outcome.plan.folds:
        texts[CONFIG_NAME] = config_text(adapter_config(outcome))
    for name, text in texts.items():
        write_text(directory / name, text)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    outputs = {str(path.relative_to(directory)): path for path in files}
    unfinished = {name for name in outputs if name.startswith(f"{WORK_DIRECTORY}{os.sep}")}
    outputs = {name: path for name, path in outputs.items() if name not in {MANIFEST_NAME, TIMINGS_NAME, *unfinished}}
    with writing(directory):
        manifest = build_manifest(outcome.plan, digests, outputs, _tensors(outcome))
    write_text(directory / MANIFEST_NAME, manifest)
    write_text(directory / TIMINGS_NAME, report.timings())


def _tensors(outcome: Outcome) -> dict[str, dict[str, str]]:
    """Digests of the tensors in each file of a model; nothing of an adapter."""
    if outcome.plan.fold is None:
        return {}
    digests = {key: digest for receipt in outcome.receipts.values() for key, digest in receipt.digests.items()}
    files = outcome.plan.fold.layout.files
    return {name: {key: digests[key] for key in header.specs} for name, header in files.items()}


def index_of(reports: Mapping[str, Report]) -> str:
    """What the directories of a sweep hold, as indented JSON."""
    variants = [
        {
            "name": name,
            "method": report.method,
            "rank": report.rank,
            "merged_norm": report.totals.merged_norm,
            "kept_energy": report.totals.kept_energy,
        }
        for name, report in reports.items()
    ]
    return json.dumps({"schema_version": 1, "variants": variants}, indent=1) + "\n"


def adapter_config(outcome: Outcome) -> dict[str, object]:
    """The ``adapter_config.json`` of a merged adapter."""
    inputs = outcome.plan.inputs
    return output_config(
        base_model=outcome.plan.base_model,
        revision=_agreed(c.revision for c in inputs),
        task_type=_agreed(c.task_type for c in inputs),
        modules=[module.name for module in outcome.plan.modules],
        rank=max(outcome.ranks.values()),
        fan_in_fan_out=any(c.fan_in_fan_out for c in inputs),
        rank_pattern=outcome.ranks,
    )


def _agreed(values: Iterable[str | None]) -> str | None:
    """The value that all inputs which give one agree on, else None."""
    given = {value for value in values if value}
    return given.pop() if len(given) == 1 else None


def _relative_to(output: Path, made: Plan) -> Recipe:
    """The recipe with local paths written from the output directory, so that it runs again from there."""
    start = made.recipe.directory
    models = []
    for entry in made.recipe.models:
        local = isinstance(entry.model, str) and (start / entry.model).exists()
        path = os.path.relpath(start / str(entry.model), output) if local else entry.model
        models.append(entry.model_copy(update={"model": path}))
    base = made.recipe.base_model
    if base is not None and made.folds:
        base = os.path.relpath(start / base, output)
    # What it was run with changes nothing of the result, and another machine has other means.
    changes: dict[str, object] = {"models": tuple(models), "base_model": base, "sweep": {}, "execution": Execution()}
    return made.recipe.model_copy(update=changes)
