"""AdaLoRA: ΔW = α / (r0 + 1e-5) · B diag(E) A, of the rank that pruning left of r0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, FiniteFloat

from mergekit_lowrank.formats.adapter_config import Rank
from mergekit_lowrank.formats.variants.checkpoint import VariantCheckpoint
from mergekit_lowrank.formats.variants.config import VariantConfig
from mergekit_lowrank.formats.variants.forms import Form, Parts, Shape, Sizes
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.lowrank.structured import with_diagonals

__all__ = ["AdaloraCheckpoint"]

_RANK_OFFSET = 1e-5  # peft 0.21, tuners/adalora/layer.py: get_delta_weight
_LORA_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "alora_invocation_tokens",
    "target_parameters",
)


def _shape(sizes: Sizes) -> Shape:
    return Shape(sizes["out"], sizes["in"], max(1, sizes["r"]))


def _update(parts: Parts) -> LowRankUpdate:
    """Rank 1 and zero where pruning left nothing."""
    b, a, values = parts["lora_B"], parts["lora_A"], parts["lora_E"]
    if not len(values):
        return LowRankUpdate(b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1]))
    return with_diagonals(LowRankUpdate(b, a), values.flatten())


class AdaloraConfig(VariantConfig):
    """Of AdaLoRA, which has all fields of LoRA, and does without most of them."""

    ignored: ClassVar[frozenset[str]] = VariantConfig.ignored | {
        "lora_dropout",
        # Of LoRA; peft does not look at them here, or forbids them.
        "r",
        "use_rslora",
        "alpha_pattern",
        "init_lora_weights",
        "lora_bias",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "ensure_weight_tying",
        # How ranks were chosen: the tensors themselves say what came out.
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    }
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_LORA_VARIANTS, "peft does not combine it with AdaLoRA. Remove it if it had no effect."),
        "layer_replication": "it changes which layers the base has. Train on the replicated model, saved on its own.",
        "trainable_token_indices": "rows of embeddings beside AdaLoRA are not handled. Train without them.",
    }

    init_r: Rank
    # At zero or less, peft takes the rank in its place: that before pruning in training, that after it when loading.
    lora_alpha: Annotated[FiniteFloat, Field(gt=0)]
    rank_pattern: dict[str, list[bool]] = Field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"

    def rank_of(self, module: str) -> int:
        """What pruning left, or ``init_r`` where it has not begun."""
        kept = self.rank_pattern.get(f"{module}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def scaling_of(self, module: str) -> float:
        """By the rank before pruning, which peft keeps when it prunes."""
        return self.lora_alpha / (self.init_r + _RANK_OFFSET)


class AdaloraCheckpoint(VariantCheckpoint):
    """An AdaLoRA adapter, as peft 0.21 applies it (``tuners/adalora/layer.py``)."""

    Config: ClassVar[type[VariantConfig]] = AdaloraConfig
    forms: ClassVar[tuple[Form, ...]] = (
        Form({"lora_A": "r in", "lora_B": "out r", "lora_E": "r 1"}, _shape, _update, least_rank=0),
    )
