"""JSON Schemas of the files that a merge, and what looks at merges, write."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from mergekit_lowrank.engine import ModuleRecord
from mergekit_lowrank.report.results import Report

__all__ = ["json_schema", "report_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def json_schema(model: type[BaseModel], mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
    """The JSON Schema of what a model writes; with the mode ``validation``, of what it reads."""
    return {"$schema": DIALECT, **model.model_json_schema(mode=mode)}


def report_schema() -> dict[str, Any]:
    """That of ``report.json``: ``Report`` without what stands in ``timings.json``."""
    schema = json_schema(Report)
    _drop(schema, "memory")
    _drop(schema["$defs"]["Totals"], "wall_seconds")
    del schema["$defs"]["Memory"]
    schema["properties"]["modules"]["items"] = _module_schema()
    return schema


def _module_schema() -> dict[str, Any]:
    schema = TypeAdapter(ModuleRecord).json_schema(mode="serialization")
    for name in ("wall_seconds", "peak_bytes"):
        _drop(schema, name)
    schema["properties"]["written_rank"] = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    told = {**_attributes(ModuleRecord), "written_rank": "rows of A in the file, padding included; null of no factors"}
    for name, field in schema["properties"].items():
        field["description"] = told[name]
    return {**schema, "required": [*schema["properties"]], "additionalProperties": False}


def _drop(schema: dict[str, Any], name: str) -> None:
    del schema["properties"][name]
    schema["required"] = [own for own in schema["required"] if own != name]


def _attributes(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each attribute."""
    _, _, told = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    return {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(told)}
