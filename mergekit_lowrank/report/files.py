"""What an output directory holds beside tensors: configuration, card, recipe, report, page, manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mergekit_lowrank.engine import Outcome, Plan, adapter_config, located_base, model_config
from mergekit_lowrank.filenames import SIDE_FILE
from mergekit_lowrank.formats import (
    CONFIG_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    REPORT_NAME,
    TIMINGS_NAME,
    WORK_DIRECTORY,
    PeftFormat,
    Writer,
    config_text,
    write_text,
    writing,
)
from mergekit_lowrank.formats.tokenizers import copy_tokenizer
from mergekit_lowrank.recipe import Execution, From, Recipe
from mergekit_lowrank.report.card import model_card
from mergekit_lowrank.report.manifest import Digests, build_manifest
from mergekit_lowrank.report.page import merge_page
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.strategies import Preset

__all__ = ["index_of", "translate", "write_texts"]


def write_texts(
    directory: Path,
    output: Path,
    outcome: Outcome,
    report: Report,
    method: Preset,
    digests: Digests,
    writer: Writer | None = None,
) -> None:
    """Write what belongs beside the tensors of an output.

    Args:
        directory: where it is being made.
        output: where it will lie; paths in the recipe are written from there.
        outcome: of the merge.
        report: of it.
        method: that of the recipe.
        digests: of the source files; empty under ``--no-hash``.
        writer: of the dialect that an adapter is written in; None for PEFT's.

    Raises:
        OutputError: the disk is full or failed.
        CheckpointError: the dialect has no place for something in the adapter.
    """
    texts = {
        "README.md": model_card(outcome.plan, report, method, digests),
        "recipe.yaml": _relative_to(output, outcome.plan).to_yaml(),
        REPORT_NAME: report.to_json(),
    }
    if not outcome.plan.folds:
        texts[CONFIG_NAME] = config_text(adapter_config(outcome.plan, outcome.ranks))
    if not outcome.plan.folds:  # a model has it with its other small files
        copy_tokenizer(outcome.plan.tokenizer, directory)
    for name, text in texts.items():
        write_text(directory / name, text)
    config = model_config(outcome.plan.inputs)
    if config is not None and (directory / SIDE_FILE).is_file():
        with writing(directory / config.name):
            shutil.copyfile(config, directory / config.name)
    if writer is not None:
        translate(directory, outcome.plan, writer)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    outputs = {str(path.relative_to(directory)): path for path in files}
    unfinished = {name for name in outputs if name.startswith(f"{WORK_DIRECTORY}{os.sep}")}
    apart = {MANIFEST_NAME, TIMINGS_NAME, PAGE_NAME, *unfinished}
    outputs = {name: path for name, path in outputs.items() if name not in apart}
    with writing(directory):
        manifest = build_manifest(outcome.plan, digests, outputs, _tensors(outcome))
    write_text(directory / MANIFEST_NAME, manifest)
    write_text(directory / TIMINGS_NAME, report.timings())
    write_text(directory / PAGE_NAME, merge_page(directory))


def translate(directory: Path, plan: Plan, writer: Writer) -> None:
    """Write the PEFT adapter in a directory in another dialect, and take PEFT's files away."""
    adapter = PeftFormat().open(directory, label="the merged adapter")
    adapter.base_model = located_base(plan)
    writer.write(adapter, directory)
    with writing(directory):
        for path in adapter.files:
            path.unlink()


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


def _relative_to(output: Path, made: Plan) -> Recipe:
    """The recipe with local paths written from the output directory, so that it runs again from there."""
    start = made.recipe.directory
    models = []
    for entry in made.recipe.models:
        local = isinstance(entry.model, str) and (start / entry.model).exists()
        path = os.path.relpath(start / str(entry.model), output) if local else entry.model
        models.append(entry.model_copy(update={"model": path}))
    base = made.recipe.base_model
    if base is not None and (start / base).is_dir():
        base = os.path.relpath(start / base, output)
    # What it was run with changes nothing of the result, and another machine has other means.
    changes: dict[str, object] = {"models": tuple(models), "base_model": base, "sweep": {}, "execution": Execution()}
    return made.recipe.model_copy(update=changes | _by_label(made))


def _by_label(made: Plan) -> dict[str, object]:
    """The sources that the recipe names, by names that do not change with the place of the recipe."""
    labels = {checkpoint.location: checkpoint.label for checkpoint in made.inputs}
    tokenizer, extras = made.recipe.tokenizer_source, made.recipe.extras
    if tokenizer is not None:
        named = labels | ({made.recipe.base_model: "base"} if made.recipe.base_model else {})
        tokenizer = named.get(tokenizer, tokenizer)
    if isinstance(extras, From):
        extras = extras.model_copy(update={"model": labels.get(extras.model, extras.model)})
    return {"tokenizer_source": tokenizer, "extras": extras}
