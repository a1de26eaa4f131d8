"""Reading and writing checkpoints: headers first, tensors on demand."""

from mergekit_lowrank.formats.adapter import Adapter
from mergekit_lowrank.formats.base import Checkpoint, Format, ModuleHeader
from mergekit_lowrank.formats.directory import new_directory, write_text
from mergekit_lowrank.formats.peft import PeftCheckpoint, PeftFormat
from mergekit_lowrank.formats.peft_config import CONFIG_NAME, PeftConfig
from mergekit_lowrank.formats.peft_keys import tensor_names
from mergekit_lowrank.formats.peft_output import config_text, output_config
from mergekit_lowrank.formats.stream import SafetensorsStream
from mergekit_lowrank.formats.tensors import DTYPES, TensorSource, TensorSpec, open_tensors

__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "Adapter",
    "Checkpoint",
    "Format",
    "ModuleHeader",
    "PeftCheckpoint",
    "PeftConfig",
    "PeftFormat",
    "SafetensorsStream",
    "TensorSource",
    "TensorSpec",
    "config_text",
    "new_directory",
    "open_tensors",
    "output_config",
    "tensor_names",
    "write_text",
]
