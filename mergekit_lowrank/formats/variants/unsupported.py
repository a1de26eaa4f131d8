"""PEFT's kinds that are not read: why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UNSUPPORTED"]

_AS_LORA = "Where it was trained, save it as a LoRA: peft.save_as_lora(path, model, rank=...)."
_FOLD = "Fold it into its base with peft's merge_and_unload, and merge the whole model."
_KEEP = "It cannot be merged with anything: load it by itself."

_INPUT = f"it trains virtual tokens or a cache in front of the input, and no weight of the base. {_KEEP}"
_ROTATION = f"it multiplies the base's weights by an orthogonal matrix, so its update is not low-rank. {_FOLD}"
_SCALING = f"it scales weights or outputs of the base, so its update is not low-rank. {_FOLD}"
_OF_BASE = f"its update depends on the base's weights. {_FOLD}"
_ROUTED = f"it mixes several adapters differently for each input, so it has no single update. {_KEEP}"
_SPARSE = f"its update is sparse, or sparse after a transform, and not low-rank. {_AS_LORA}"
_BLOCKS = f"its update is made of blocks, and not low-rank as a whole. {_AS_LORA}"
_PACKED = (
    f"its factors are drawn from parameters that are stored once for all modules, which is not handled. {_AS_LORA}"
)

UNSUPPORTED: Mapping[str, str] = {
    "ADAMSS": f"its update acts on clusters of the base's singular directions. {_FOLD}",
    "ADAPTION_PROMPT": f"it adds attention to trained prompts, and changes no weight of the base. {_KEEP}",
    "BEFT": f"it trains biases only, and no matrix. {_FOLD}",
    "BOFT": _ROTATION,
    "C3A": f"its update is made of circulant blocks, which are not low-rank. {_AS_LORA}",
    "CARTRIDGE": _INPUT,
    "CPT": _INPUT,
    "DEFT": _OF_BASE,
    "DELORA": f"its factors are normalised and scaled by the norms of the base's weights. {_AS_LORA}",
    "FOURIERFT": _SPARSE,
    "FROD": _OF_BASE,
    "GLORA": f"it multiplies the base's weights as well as adding to them. {_FOLD}",
    "GRALORA": _BLOCKS,
    "HIRA": f"its low-rank matrix multiplies the base's weights entry by entry. {_FOLD}",
    "HRA": _ROTATION,
    "IA3": _SCALING,
    "LILY": f"a router mixes factors that layers share, differently for each input. {_KEEP}",
    "LN_TUNING": f"it trains the norms themselves, and no matrix. {_FOLD}",
    "MISS": _BLOCKS,
    "MULTITASK_PROMPT_TUNING": _INPUT,
    "OFT": _ROTATION,
    "OSF": f"it trains a part of the base's own singular value decomposition. {_FOLD}",
    "PEANUT": f"its update is a small network applied to the base's weights. {_FOLD}",
    "POLY": _ROUTED,
    "PREFIX_TUNING": _INPUT,
    "PROMPT_TUNING": _INPUT,
    "PSOFT": f"it rotates the base's main singular directions. {_AS_LORA}",
    "PVERA": f"its factors are drawn at random around a mean for each input, and its mean is not handled. {_FOLD}",
    "P_TUNING": _INPUT,
    "RANDLORA": f"it adds up scaled random matrices until they reach full rank. {_AS_LORA}",
    "ROAD": _SCALING,
    "SHADOW": f"it runs a second network beside the base, and changes no weight of it. {_KEEP}",
    "SHIRA": _SPARSE,
    "SUPERTUNING": f"it changes single entries of the base's weights, so its update is not low-rank. {_FOLD}",
    "TINYLORA": f"its factors are the base's singular vectors, which are not stored with it. {_AS_LORA}",
    "TRAINABLE_TOKENS": f"it trains rows of the embedding, and no matrix. {_FOLD}",
    "UNILORA": _PACKED,
    "VBLORA": _PACKED,
    "WAVEFT": _SPARSE,
    "XLORA": _ROUTED,
}
"""By ``peft_type``; of all that PEFT 0.21 knows."""
