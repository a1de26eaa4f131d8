"""Models whose weights are stored quantised, which are refused by the name of what quantised them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mergekit_lowrank.errors import CheckpointError

__all__ = ["refuse_quantised_config", "refuse_quantised_tensors"]

_ORIGINAL = "Give the model that it was quantised from, in float32, bfloat16 or float16, and quantise the result again."
_SCALED = (
    "Its weights mean nothing without their scales: give the bfloat16 model that it was made from, or load it "
    "dequantised, remove 'quantization_config' from its config.json, and save it."
)

_BITSANDBYTES, _FP8, _MXFP4 = "bitsandbytes", "fp8 with scale tensors", "MXFP4"

# By "quant_method", as transformers.utils.quantization_config.QuantizationMethod spells them.
_METHODS: Mapping[str, str] = {
    "bitsandbytes": _BITSANDBYTES,
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "mxfp4": _MXFP4,
}

# What each leaves beside or in place of X.weight.
_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)$"), _BITSANDBYTES),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"_proj_(blocks|scales)$"), _MXFP4),
    (re.compile(r"(_scale_inv|[._](weight|input)_scale)$"), _FP8),
)


def refuse_quantised_config(config: Mapping[str, object], *, where: str) -> None:
    """Do nothing for a configuration without ``quantization_config``, its own or its language model's.

    Raises:
        CheckpointError: it has one.
    """
    language = config.get("text_config")
    for part in (config, language if isinstance(language, Mapping) else {}):
        settings = part.get("quantization_config")
        if isinstance(settings, Mapping) and settings:
            method = _method(settings)
            raise _refusal(_METHODS.get(method, method), "its config.json says so in 'quantization_config'", where)


def refuse_quantised_tensors(names: Iterable[str], *, where: str) -> None:
    """Do nothing where no name is that of a quantised weight or of its scales.

    Raises:
        CheckpointError: one is.
    """
    for name in names:
        for pattern, method in _TENSORS:
            if pattern.search(name):
                raise _refusal(method, f"it holds '{name}'", where)


def _method(settings: Mapping[str, object]) -> str:
    if "quant_method" in settings:
        return str(settings["quant_method"]).lower()
    is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return _BITSANDBYTES if is_bitsandbytes else "a method that it does not name"


def _refusal(method: str, evidence: str, where: str) -> CheckpointError:
    advice = _SCALED if method in {_FP8, _MXFP4} else _ORIGINAL
    return CheckpointError(
        f"{where}: the weights are quantised by {method} ({evidence}), which is not handled. {advice}"
    )
