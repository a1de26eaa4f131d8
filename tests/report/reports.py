"""Reports of merges that never were, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lowrank.report.manifest import Manifest, OutputFile, Source
from mergekit_lowrank.report.results import InputSummary, Memory, Report, Totals

MODULES = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def record(module: str, participants: Sequence[str] = ("math", "code"), **changes: Any) -> dict[str, Any]:
    """What a report holds of a module; ``changes`` win."""
    count = len(participants)
    plain = {
        "module": module,
        "method": "ties",
        "space": "delta",
        "participants": list(participants),
        "rank": 4,
        "energy": 2.0,
        "kept_energy": 0.75,
        "cut_error": 0.5,
        "rank_for_99": 6,
        "input_norms": [float(1 + index) for index in range(count)],
        "merged_norm": 1.25,
        "scale": 1.5,
        "retention": 0.6,
        "relative_error": 0.25,
        "relative_error_is_estimate": False,
        "cosines": [[1.0 if i == j else 0.125 for j in range(count)] for i in range(count)],
        "sign_conflict": 0.25,
        "sign_conflict_error": 0.0,
        "spectrum": [1.0, 0.5, 0.25],
        "input_spectra": [[1.0, 0.5] for _ in range(count)],
        "peak_bytes": 1 << 20,
        "wall_seconds": 0.25,
        "warnings": [],
        "written_rank": 4,
    }
    return plain | changes


def summary_of(label: str, norm: float = 1.5) -> InputSummary:
    """What a report holds of an input."""
    return InputSummary(label=label, location=f"adapters/{label}", base_model="b", modules=1, weighted_norm=norm)


def report_of(records: Sequence[dict[str, Any]], labels: Sequence[str] = ("math", "code"), **changes: Any) -> Report:
    """A report of these modules; ``changes`` win."""
    totals = Totals(
        modules=len(records),
        merged_norm=2.5,
        mean_input_norm=2.0,
        kept_energy=0.75,
        rank_for_99=6,
        largest_cut_error=0.5,
        largest_relative_error=0.25,
        bytes_read=4096,
        bytes_written=2048,
        budget_bytes=None,
        wall_seconds=1.5,
    )
    plain = {
        "method": "ties",
        "inputs": [summary_of(label) for label in labels],
        "totals": totals,
        "kind": "adapter",
        "server": "vllm",
        "rank": 4,
        "dtype": "bfloat16",
        "warnings": [],
        "modules": records,
        "memory": Memory(allowed_bytes=1 << 30, planned_peak_bytes=1 << 24, process_peak_bytes=1 << 28),
    }
    return Report.model_validate(plain | changes)


def plain_report(**changes: Any) -> Report:
    """Of six modules and two inputs."""
    return report_of([record(module) for module in MODULES], **changes)


def large_report(layers: int, kinds: Sequence[str], inputs: int) -> Report:
    """Of a large model: numbers that differ, and spectra as long as they are written."""
    labels = [f"adapter-{index}" for index in range(inputs)]
    records = [
        record(
            f"model.layers.{layer}.{kind}",
            labels,
            merged_norm=1.0 + layer / 7,
            sign_conflict=layer / 1000,
            relative_error=layer / 997,
            kept_energy=1 - layer / 9973,
            wall_seconds=layer / 17,
            peak_bytes=layer * 12345,
            rank_for_99=layer,
            spectrum=[1 / (k + 1) for k in range(64)],
            input_spectra=[[1 / (k + index + 1) for k in range(64)] for index in range(inputs)],
        )
        for layer in range(layers)
        for kind in kinds
    ]
    return report_of(records, labels)


def written(directory: Path, report: Report, recipe: str = "merge_method: ties\n") -> Path:
    """The directory, with what a page is made from."""
    manifest = Manifest(
        schema_version=1,
        mergekit_lowrank="0.1.0",
        python="3.11",
        packages={"torch": "2.13.0"},
        machine="x86_64",
        seed=0,
        sources=tuple(
            Source(label=own.label, location=own.location, base_model="b", revision=None, files=())
            for own in report.inputs
        ),
        base=None,
        outputs=(
            OutputFile(name="adapter_model.safetensors", bytes=2048, sha256="f" * 64),
            OutputFile(name="model.safetensors", bytes=2048, xxh3_128={"w": "0" * 32}),
        ),
    )
    directory.mkdir(exist_ok=True)
    for name, text in {
        "report.json": report.to_json(),
        "timings.json": report.timings(),
        "manifest.json": manifest.model_dump_json(exclude_unset=True),
        "recipe.yaml": recipe,
    }.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory
