"""Every variant of a PEFT LoRA, trained a few steps by peft itself on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

STEPS, RATE = 3, 3e-2
VOCABULARY = 40
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def llama(**changes: Any) -> nn.Module:
    """A Llama with random weights, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False, **changes))


def tied_llama() -> nn.Module:
    """One whose output layer is its embedding."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    """One that stores weights as (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, tie_word_embeddings=False))


def mixtral() -> nn.Module:
    """One whose experts are fused parameters (E, out, in), and stored apart."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    """One whose experts are fused parameters (E, in, out), and stored like that."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(**sizes, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        if "experts" in name:  # which start as zeros or whatever lay in memory
            nn.init.normal_(parameter, std=0.02)
    return model


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8)
        self.one, self.two, self.three = nn.Conv1d(8, 6, 3), nn.Conv2d(1, 4, (2, 3)), nn.Conv3d(1, 4, 2)
        self.head = nn.LazyLinear(5)
        self(torch.arange(10).reshape(1, 10))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, 5)."""
        hidden = self.one(self.table(input_ids).transpose(1, 2)).tanh()
        hidden = self.two(hidden.unsqueeze(1)).tanh()
        return self.head(self.three(hidden.unsqueeze(1)).tanh().flatten(1))


IDS = torch.arange(2, 22).reshape(2, 10)


@dataclass(frozen=True)
class Variant:
    """One way to train a LoRA.

    Attributes:
        model: what is trained.
        config: arguments of ``LoraConfig``.
        extras: the recipe's policy that it needs; None where it holds nothing beside factors.
        is_dense: whether its update has full rank, so that only a model holds it exactly.
    """

    model: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    extras: str | dict[str, str] | None = None
    is_dense: bool = False


LINEAR = ["q_proj", "down_proj"]
VARIANTS: dict[str, Variant] = {
    "linear": Variant(llama, {"target_modules": LINEAR}),
    "rslora": Variant(llama, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": Variant(
        llama, {"target_modules": LINEAR, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"1.*q_proj": 3}}
    ),
    "layers": Variant(llama, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "all_linear": Variant(llama, {"target_modules": "all-linear"}),
    "fan_in_fan_out": Variant(gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": Variant(llama, {"target_modules": ["q_proj", "embed_tokens"]}, "average"),
    "convolutions": Variant(Convolutions, {"target_modules": ["one", "two", "three", "table", "head"]}),
    "lora_bias": Variant(llama, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias_all": Variant(llama, {"target_modules": LINEAR, "bias": "all"}, "average"),
    "bias_lora_only": Variant(llama, {"target_modules": ["q_proj"], "bias": "lora_only"}, "average"),
    "modules_to_save": Variant(
        llama, {"target_modules": LINEAR, "modules_to_save": ["lm_head", "input_layernorm"]}, "average"
    ),
    "tied_modules_to_save": Variant(
        tied_llama,
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "average",
    ),
    "token_rows": Variant(llama, {"target_modules": LINEAR, "trainable_token_indices": [3, 7, 12]}, "average"),
    "tied_token_rows": Variant(
        tied_llama, {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [3, 7]}}, "average"
    ),
    "experts": Variant(
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts_in_out": Variant(
        gpt_oss,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "dora": Variant(llama, {"target_modules": LINEAR, "use_dora": True}, is_dense=True),
    "dora_embedding": Variant(
        llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, "average", is_dense=True
    ),
    "dora_fan_in_fan_out": Variant(
        gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, is_dense=True
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    """Of a fixed batch."""
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def trained(variant: Variant, path: Path, seed: int) -> Path:
    """An adapter, trained a few steps and saved by peft."""
    model = variant.model()
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, **variant.config))
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        found = adapted(input_ids=IDS)
        found = found if isinstance(found, torch.Tensor) else found.logits
        (found * torch.randn(found.shape)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(path)
    return path


def loaded(variant: Variant, path: Path) -> torch.Tensor:
    """The logits of the model with an adapter that peft loads."""
    return logits(PeftModel.from_pretrained(variant.model(), path))


def summed(variant: Variant, paths: list[Path], weights: list[float]) -> torch.Tensor:
    """The logits of W0 + Σ w·ΔW of all parameters, each ΔW as peft merges its adapter."""
    base = variant.model()
    whole = {name: tensor.double() for name, tensor in base.state_dict().items()}
    total = dict(whole)
    for path, weight in zip(paths, weights, strict=True):
        merged = PeftModel.from_pretrained(variant.model(), path).merge_and_unload().state_dict()
        for name, tensor in whole.items():
            total[name] = total[name] + weight * (merged[name].double() - tensor)
    base.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    return logits(base)
