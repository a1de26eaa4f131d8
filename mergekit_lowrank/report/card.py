"""``README.md`` of the output: a model card that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import Plan
from mergekit_lowrank.engine.provenance import (
    SourceCard,
    agreed,
    agreed_licence,
    named_base,
    source_cards,
    weight_range,
)
from mergekit_lowrank.engine.targets import dialect_of
from mergekit_lowrank.policies import VLLM_RANKS, snapped
from mergekit_lowrank.recipe import write_yaml
from mergekit_lowrank.report.manifest import Digests
from mergekit_lowrank.report.results import Report
from mergekit_lowrank.strategies import Preset

__all__ = ["model_card"]

LIBRARIES = {"kohya": "diffusers", "diffusers": "diffusers", "gguf": "gguf"}
"""What the Hub calls the library that loads an adapter in another format than PEFT's."""

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The Hub's tasks by PEFT's task types (peft 0.21.2)."""


def model_card(plan: Plan, report: Report, method: Preset, digests: Digests) -> str:
    """The card: metadata for the Hub, sources, method, what was kept, the recipe, how to load it."""
    cards = source_cards(plan.recipe, plan.inputs, plan.base)
    base = named_base(plan.recipe, plan.inputs)
    is_peft = not plan.folds and dialect_of(plan.recipe) == "peft"
    loading = [_loading(report, base)] if is_peft else []
    sections = [_sources(plan, digests, cards, base), _method(report, method), _recipe(plan), *loading]
    body = "\n\n".join("\n".join(section) for section in sections)
    metadata = write_yaml(_metadata(plan, cards, base))
    return f"---\n{metadata}---\n\n# Merged {plan.recipe.output.kind}\n\n{body}\n"


def _metadata(plan: Plan, cards: Sequence[SourceCard], base: str | None) -> dict[str, object]:
    """What the Hub reads, in its own words; only what is known."""
    library = "transformers" if plan.folds else LIBRARIES.get(dialect_of(plan.recipe), "peft")
    licence = agreed_licence(cards)
    tag = agreed(card.pipeline_tag for card in cards[: len(plan.inputs)])
    known = {
        "library_name": library,
        "base_model": base,
        "base_model_relation": ("merge" if plan.folds else "adapter") if base else None,
        "license": licence and licence.id,
        "license_name": licence and licence.name,
        "license_link": licence and licence.link,
        "pipeline_tag": tag or PIPELINES.get(agreed(c.task_type for c in plan.inputs) or ""),
        "tags": [*([] if plan.folds else ["lora"]), "merge", "mergekit-lowrank"],
    }
    return {key: value for key, value in known.items() if value is not None}


def _sources(plan: Plan, digests: Digests, cards: Sequence[SourceCard], base: str | None) -> Iterator[str]:
    added = f", added to {base}" if plan.folds else ""
    whole = any(module.shape.dense for module in plan.modules)
    what = f"{len(plan.inputs)} {'models' if whole else 'LoRA adapters'}{added}"
    yield f"A merge of {what}, made with mergekit-lowrank {__version__}."
    yield ""
    yield "| source | weight | licence | sha256 of its tensors |"
    yield "|---|---|---|---|"
    for t, checkpoint in enumerate(plan.inputs):
        tensors = [digests[path] for path in checkpoint.files if path in digests and path.suffix != ".json"]
        hashes = "<br>".join(f"`{digest[:16]}…`" for digest in tensors) or "not recorded"
        yield f"| `{checkpoint.label}` | {_weight(plan, t)} | {cards[t].licence or 'not given'} | {hashes} |"
    if base:
        yield ""
        yield f"Base model: `{base}`{_revision(plan)}{_licence(cards[len(plan.inputs) :])}."


def _revision(plan: Plan) -> str:
    revision = agreed(checkpoint.revision for checkpoint in plan.inputs)
    return f", revision `{revision}`" if revision else ""


def _licence(cards: Sequence[SourceCard]) -> str:
    return "".join(f", licence {card.licence}" for card in cards if card.licence)


def _weight(plan: Plan, t: int) -> str:
    low, high = weight_range(plan, t)
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
    if report.has_one_rank and report.server is not None:
        yield "Every server reads it alike: one rank, `lora_alpha` equal to `r`, all scaling in the factors."
    elif not report.has_one_rank:
        yield "peft reads it: ranks differ between modules and stand in `rank_pattern`, with an equal `alpha_pattern`."
    else:
        yield "peft reads it. Servers differ in what lies beside the factors; `mergekit-lowrank check` tells how."
    is_served = report.server == "vllm" and report.has_one_rank and report.rank is not None
    limit = snapped(report.rank, VLLM_RANKS) if is_served and report.rank is not None else None
    if limit is not None:
        yield ""
        yield "```console"
        yield f"vllm serve {base or 'BASE_MODEL'} --enable-lora --max-lora-rank {limit} --lora-modules merged=PATH"
        yield "```"
