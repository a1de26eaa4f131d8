"""``README.md`` of the output: a model card that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import Plan
from mergekit_lowrank.policies import VLLM_RANKS, snapped
from mergekit_lowrank.recipe import write_yaml
from mergekit_lowrank.report.manifest import Digests
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.strategies import Preset

__all__ = ["model_card"]


def model_card(plan: Plan, report: Report, method: Preset, digests: Digests) -> str:
    """The card: metadata for the Hub, sources, method, what was kept, the recipe, how to load it."""
    base = plan.base_model
    library, relation, tags = ("transformers", "merge", []) if plan.folds else ("peft", "adapter", ["lora"])
    metadata: dict[str, object] = {"library_name": library, "tags": [*tags, "merge", "mergekit-lowrank"]}
    if base:
        metadata |= {"base_model": base, "base_model_relation": relation}
    loading = [] if plan.folds else [_loading(report, base)]
    sections = [_sources(plan, digests), _method(report, method), _recipe(plan), *loading]
    body = "\n\n".join("\n".join(section) for section in sections)
    return f"---\n{write_yaml(metadata)}---\n\n# Merged {plan.recipe.output.kind}\n\n{body}\n"


def _sources(plan: Plan, digests: Digests) -> Iterator[str]:
    added = f", added to {plan.base_model}" if plan.folds else ""
    whole = any(module.shape.dense for module in plan.modules)
    what = f"{len(plan.inputs)} {'models' if whole else 'LoRA adapters'}{added}"
    yield f"A merge of {what}, made with mergekit-lowrank {__version__}."
    yield ""
    yield "| source | weight | sha256 of its tensors |"
    yield "|---|---|---|"
    for t, checkpoint in enumerate(plan.inputs):
        tensors = [digests[path] for path in checkpoint.files if path in digests and path.suffix != ".json"]
        hashes = "<br>".join(f"`{digest[:16]}…`" for digest in tensors) or "not recorded"
        yield f"| `{checkpoint.label}` | {_weight(plan, t)} | {hashes} |"


def _weight(plan: Plan, t: int) -> str:
    weights = {m.weights[m.participants.index(t)] for m in plan.modules if t in m.participants}
    low, high = min(weights), max(weights)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}, by module"


def _method(report: Report, method: Preset) -> Iterator[str]:
    yield "## Method"
    yield ""
    yield f"**{method.name}**: {method.summary}." + (f" {method.paper}." if method.paper else "")
    yield ""
    totals = report.totals
    yield f"{totals.modules} modules at {report.rank_text}, {100 * totals.kept_energy:.2f} % of the merged energy kept."
    if report.warnings:
        yield ""
        yield from (f"* {warning}" for warning in report.warnings)


def _recipe(plan: Plan) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    yield f"```yaml\n{plan.recipe.to_yaml()}```"


def _loading(report: Report, base: str | None) -> Iterator[str]:
    yield "## Use"
    yield ""
    if report.has_one_rank:
        yield "Every server reads it alike: one rank, `lora_alpha` equal to `r`, all scaling in the factors."
    else:
        yield "peft reads it: ranks differ between modules and stand in `rank_pattern`, with an equal `alpha_pattern`."
    limit = snapped(report.rank, VLLM_RANKS) if report.rank is not None and report.has_one_rank else None
    if limit is not None:
        yield ""
        yield "```console"
        yield f"vllm serve {base or 'BASE_MODEL'} --enable-lora --max-lora-rank {limit} --lora-modules merged=PATH"
        yield "```"
