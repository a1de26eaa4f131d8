"""What llama.cpp calls the tensors of a base model, and which of them its converter reorders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.checked import read_object

__all__ = ["ARCHITECTURES", "Architecture", "BaseModel", "base_config_of"]

_CONFIG = "config.json"
_VISION_LANGUAGE_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))
"""Of the text model in a model of text and images; llama.cpp's converter takes them off."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp sees one ``model_type``.

    Attributes:
        name: ``general.architecture``.
        permutes: whether the rows of q and k are reordered within each head, from halves to pairs that rotate together.
        is_tied: whether the output layer is the embedding where ``config.json`` does not say.
    """

    name: str
    permutes: bool = False
    is_tied: bool = False


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", permutes=True),
        "mistral": Architecture("llama", permutes=True),
        "granite": Architecture("granite", permutes=True),
        "smollm3": Architecture("smollm3", permutes=True, is_tied=True),
        "qwen2": Architecture("qwen2"),
        "qwen3": Architecture("qwen3"),
        "gemma": Architecture("gemma", is_tied=True),
        "gemma2": Architecture("gemma2", is_tied=True),
        "gemma3": Architecture("gemma3", is_tied=True),
        "gemma3_text": Architecture("gemma3", is_tied=True),
        "phi3": Architecture("phi3"),
    }
)
"""By ``model_type``. Source: ``undo_permute`` and ``model_arch`` in ``conversion/*.py`` of llama.cpp, November 2026."""


class BaseModel:
    """The base of an adapter, as far as the names and the order of its weights go.

    Args:
        config: its ``config.json``.
        where: what messages call the adapter.

    Raises:
        CheckpointError: an unknown ``model_type``, or fields that are missing.
    """

    def __init__(self, config: Mapping[str, object], *, where: str) -> None:
        self._where = where
        self.architecture = _architecture(config, where)
        text = config.get("text_config")
        self._config = text if isinstance(text, Mapping) else config
        tied = self._config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        self.is_tied = bool(self.architecture.is_tied if tied is None else tied)
        self._layers = self._number("num_hidden_layers")

    def names(self, modules: Mapping[str, object]) -> dict[str, str]:
        """llama.cpp's name of the weight of each module that it knows, such as ``blk.0.attn_q.weight``."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        known = get_tensor_name_map(arch, self._layers)
        found = {module: known.get_name(f"{_text_name(module)}.weight", (".weight",)) for module in modules}
        return {module: name for module, name in found.items() if name is not None}

    def heads_of(self, module: str) -> int | None:
        """The number of heads within which the rows of a module are reordered; None where they are not.

        Raises:
            CheckpointError: the configuration does not say.
        """
        if not self.architecture.permutes or not module.endswith(("q_proj", "k_proj")):
            return None
        heads = self._number("num_attention_heads")
        of_keys = module.endswith("k_proj") and self._config.get("num_key_value_heads") is not None
        return self._number("num_key_value_heads") if of_keys else heads

    def _number(self, field: str) -> int:
        value = self._config.get(field)
        if isinstance(value, int) and value > 0:
            return value
        raise CheckpointError(
            f"{self._where}: '{field}' of the base model is {value!r}; expected a number above zero. "
            f"Give the base's own {_CONFIG}."
        )


def base_config_of(base_model: str | None, *, where: str) -> Mapping[str, object]:
    """The ``config.json`` of the base that an adapter names: a directory, or a model that was downloaded before.

    Raises:
        CheckpointError: there is none on this machine, or it cannot be read.
    """
    path = _config_path(base_model)
    if path is None:
        raise CheckpointError(
            f"{where}: llama.cpp's names and order of weights follow from the {_CONFIG} of the base model, and "
            f"{repr(base_model) if base_model else 'the one it was tuned from'} is not on this machine. "
            "Give the base model's directory (--base)."
        )
    return read_object(path, where=where)


def _config_path(base_model: str | None) -> Path | None:
    if not base_model:
        return None
    local = Path(base_model) / _CONFIG
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base_model, _CONFIG)
    except HFValidationError:  # a path, and no name on the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def _architecture(config: Mapping[str, object], where: str) -> Architecture:
    kind = config.get("model_type")
    found = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise CheckpointError(
            f"{where}: the base model is of type {kind!r}; how llama.cpp orders its weights is not known here. "
            f"Known types: {', '.join(sorted(ARCHITECTURES))}. Fold the adapter into the base and convert that instead."
        )
    return found


def _text_name(module: str) -> str:
    for prefix, replacement in _VISION_LANGUAGE_PREFIXES:
        if module.startswith(prefix):
            return replacement + module.removeprefix(prefix)
    return module
