"""The closing lines of a merge: what was merged, what was kept, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lowrank.engine import format_bytes
from mergekit_lowrank.policies import VLLM_RANKS, snapped
from mergekit_lowrank.report.results import Report

__all__ = ["closing_lines", "load_lines", "percent"]

LOADING = {
    "vllm": "vLLM         vllm serve {base} --enable-lora --max-lora-rank {snapped} --lora-modules merged={path}",
    "sglang": "SGLang       python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
    "--lora-paths merged={path}",
    "llama.cpp": "llama.cpp    llama-server -m BASE.gguf --lora {path}/adapter.gguf",
    "diffusers": "diffusers    pipeline.load_lora_weights({path!r})",
    "comfyui": "ComfyUI      copy {path}/*.safetensors to models/loras",
}
"""How each server loads an adapter."""

LARGE_RATIO = 2.0
"""A merged norm above this many mean input norms is pointed out."""


def closing_lines(report: Report, location: str | None) -> Iterator[str]:
    """The summary, a line at a time."""
    totals = report.totals
    what = "adapters" if report.kind == "adapter" else "inputs"
    yield (
        f"Merged {len(report.inputs)} {what} with {report.method}: {totals.modules} modules, {report.rank_text}, "
        f"{report.dtype}, {format_bytes(totals.bytes_written)} in {totals.wall_seconds:.1f} s"
    )
    norms = ", ".join(f"{summary.label} {summary.weighted_norm:.3g}" for summary in report.inputs)
    yield f"  norms        inputs (times weight): {norms}; merged: {totals.merged_norm:.3g}"
    if report.rank is not None or totals.kept_energy < 1:
        yield f"  energy kept  {percent(totals.kept_energy)} at {report.rank_text}; {_needed(report)}"
    if totals.budget_bytes is not None:
        used, given = format_bytes(totals.bytes_written), format_bytes(totals.budget_bytes)
        yield f"  budget       {used} of {given} used"
    if totals.mean_input_norm and totals.merged_norm > LARGE_RATIO * totals.mean_input_norm:
        ratio = totals.merged_norm / totals.mean_input_norm
        yield (
            f"  note         the merged norm is {ratio:.1f} times the mean input norm; "
            "a method's own scale is seldom the best: try `scale: auto`"
        )
    for warning in report.warnings:
        yield f"  warning      {warning}"
    if location is not None:
        yield from load_lines(report, location)


def percent(share: float) -> str:
    """A share that was cut never reads as whole."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def _needed(report: Report) -> str:
    if report.totals.rank_for_99 is None:
        return "99 % in every module would need a higher rank than was decomposed (a dense result)"
    return f"99 % in every module needs rank {report.totals.rank_for_99}"


def load_lines(report: Report, location: str) -> Iterator[str]:
    """How peft and a server load the result; of a model, transformers; of a plugin's dialect, where it lies."""
    if report.rank is None or report.kind == "model":
        yield f"  transformers AutoModel.from_pretrained({location!r})"
        return
    if report.format == "peft":
        yield f"  peft         PeftModel.from_pretrained(base_model, {location!r})"
    if report.server is not None:
        yield "  " + LOADING[report.server].format(
            base=next((own.base_model for own in report.inputs if own.base_model), "BASE_MODEL"),
            rank=report.rank,
            snapped=snapped(report.rank, VLLM_RANKS),
            path=location,
        )
    elif report.format != "peft":
        yield f"  {report.format:<12} {location}"
