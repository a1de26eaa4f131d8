"""The configuration of the adapters this package writes: the one convention that every server reads right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

__all__ = ["config_text", "output_config"]


def output_config(
    *,
    base_model: str | None,
    revision: str | None,
    task_type: str | None,
    modules: Sequence[str],
    rank: int,
    fan_in_fan_out: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
) -> dict[str, object]:
    """The ``adapter_config.json`` of an adapter whose factors carry all scaling: alpha equals r in every module.

    Args:
        base_model: name or path of the model the inputs were tuned from.
        revision: its revision, where the inputs agree on one.
        task_type: PEFT's, such as ``CAUSAL_LM``.
        modules: full names of the modules merged.
        rank: the rank of every module that ``rank_pattern`` does not name.
        fan_in_fan_out: whether the base stores its weights as (in, out).
        rank_pattern: rank by full module name, where ranks differ. Most servers ignore it.
    """
    ranks = {module: (rank_pattern or {}).get(module, rank) for module in sorted(modules)}
    # peft matches keys as (.*\.)?(KEY)$; the anchor keeps the optional group empty, so a key hits its module only.
    deviating = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(ranks),
        "rank_pattern": deviating,
        "alpha_pattern": dict(deviating),
    }


def config_text(config: Mapping[str, object]) -> str:
    """The text of ``adapter_config.json``. Keys keep their order: in the patterns the first match wins."""
    return json.dumps(config, indent=2) + "\n"
