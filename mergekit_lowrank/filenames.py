"""What the files of checkpoints are called, for those who look for them without opening any."""

from __future__ import annotations

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "MODEL_CONFIG", "MODEL_WEIGHTS", "OUTLINE_MARK", "SIDE_FILE"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)
"""In the order in which peft prefers them."""

MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers prefers them."""

SIDE_FILE = "non_lora_trainables.bin"
"""What LLaVA keeps beside an adapter: a projector, as whole tensors."""

OUTLINE_MARK = "mergekit_lowrank.outline"
"""In the header's metadata of a safetensors file without data, so that no reader takes its zeros for tensors."""
