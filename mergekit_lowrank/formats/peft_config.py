"""The configuration of a LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveInt

from mergekit_lowrank.filenames import ADAPTER_CONFIG
from mergekit_lowrank.formats.adapter_config import (
    AdapterConfig,
    Names,
    Pattern,
    first_match,
    is_named,
    is_unset,
    short,
)

__all__ = ["CONFIG_NAME", "PeftConfig"]

CONFIG_NAME = ADAPTER_CONFIG

_PLAIN = "Train or export it as a plain LoRA."
_FOLD = "Fold it into its base model and extract a plain LoRA from the difference."

_PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _tokens(value: object) -> object:
    """Lists as tuples, one level down too."""
    if isinstance(value, Mapping):
        return {key: _tokens(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[tuple[_Token, ...] | dict[str, tuple[_Token, ...]] | None, BeforeValidator(_tokens)]


class PeftConfig(AdapterConfig):
    """What a LoRA configuration says about merging."""

    ignored: ClassVar[frozenset[str]] = AdapterConfig.ignored | {
        "lora_dropout",
        "ensure_weight_tying",
        # Without effect unless a field that is refused below, or a refused init_lora_weights, turns them on.
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "layer_replication": "it changes which layers the base has. Train on the replicated model, saved on its own.",
        "megatron_config": "Megatron layers split factors across devices. Convert the adapter to Hugging Face layers.",
        "use_qalora": f"QALoRA pools the input before lora_A, so its update is not lora_B @ lora_A. {_FOLD}",
        "use_bdlora": f"block-diagonal factors are stored in a layout of their own. {_FOLD}",
        "kasa_config": f"KaSA puts singular values between the factors and truncates the base weights. {_FOLD}",
        "arrow_config": "Arrow routes between adapters and has no single update. Merge those adapters.",
        "monteclora_config": f"MonteCLoRA samples around its factors. {_PLAIN}",
        "velora_config": f"VeLoRA changes how the adapter is trained, in ways that are not checked here. {_PLAIN}",
        "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens; merged, it would always "
        "act. Use it unmerged.",
    }

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: dict[Pattern, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, FiniteFloat] = Field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    trainable_token_indices: _Tokens = None
    target_parameters: Names = ()

    def rank_of(self, module: str) -> int:
        """The rank that the configuration claims for a module."""
        return first_match(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return first_match(self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str, *, rank: int) -> float:
        """What multiplies b · a in a module whose factors have rank ``rank``: alpha/r, or alpha/√r with rsLoRA."""
        alpha = self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that were trained; None where the configuration names none of it."""
        given = self.trainable_token_indices
        if isinstance(given, dict):
            return next((rows for name, rows in given.items() if is_named(name, module)), None)
        return given

    def parameters_of(self, path: str) -> tuple[str, ...]:
        """The parameters among ``target_parameters`` that a module has, by their full names.

        peft nests those of one module under ``base_layer``, and does not say which is which.
        """
        holder = re.sub(r"(\.base_layer)+$", "", path)
        own = (name.rpartition(".") for name in self.target_parameters)
        return tuple(f"{holder}.{parameter}" for target, _, parameter in own if is_named(target, holder))

    @classmethod
    def _judge(cls, name: str, value: object) -> Iterator[str]:
        return _judge_initialisation(value) if name == "init_lora_weights" else super()._judge(name, value)


def _judge_initialisation(value: object) -> Iterator[str]:
    name = str(value).lower()
    if name.startswith(_BASE_CHANGING_INITIALISATIONS):
        yield (
            f"'init_lora_weights' is {short(value)}, which changes the base weights, so that the adapter does not fit "
            "the original base. Save it as a plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    elif not is_unset(value) and name not in _PLAIN_INITIALISATIONS:
        yield (
            f"'init_lora_weights' is {short(value)}, which is unknown: it may change the base weights. "
            "Set it to true if it does not."
        )
