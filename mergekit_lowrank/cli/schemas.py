"""``schema``: the JSON Schema of each kind of file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["run_schema"]

MODELS: Mapping[str, tuple[str, str]] = {
    "comparison": ("report.comparison", "MergeComparison"),
    "diagnosis": ("diagnostics", "Diagnosis"),
    "evaluation": ("evaluation", "Evaluation"),
    "manifest": ("report.manifest", "Manifest"),
    "verification": ("verification", "Verification"),
}
"""The room and the name of the model of each kind; recipe and report have functions of their own, and
tasks are read, not written."""


def run_schema(kind: str) -> None:
    """Print the schema of one kind."""
    click.echo(json.dumps(_schema(kind), indent=1))


def _schema(kind: str) -> dict[str, Any]:
    if kind == "recipe":  # without what the others load
        from mergekit_lowrank.recipe import recipe_schema

        return recipe_schema()
    from mergekit_lowrank.report.schemas import json_schema, report_schema

    if kind == "tasks":
        from mergekit_lowrank.evaluation import Tasks

        return json_schema(Tasks, "validation")
    if kind in MODELS:
        room, name = MODELS[kind]
        return json_schema(getattr(importlib.import_module(f"mergekit_lowrank.{room}"), name))
    return report_schema()
