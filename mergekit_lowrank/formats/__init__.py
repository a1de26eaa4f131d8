"""Reading and writing checkpoints: headers first, tensors on demand."""

from mergekit_lowrank.formats.adapter import Adapter
from mergekit_lowrank.formats.base import Checkpoint, Format, ModuleHeader
from mergekit_lowrank.formats.directory import (
    INDEX_NAME,
    MANIFEST_NAME,
    TIMINGS_NAME,
    WORK_DIRECTORY,
    empty_directory,
    new_directory,
    partial_path,
    shared_directory,
    write_text,
    writing,
)
from mergekit_lowrank.formats.fine_tune import FineTune, WholeModel, WholeModelFormat
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.model_output import ModelLayout, ModelWriter
from mergekit_lowrank.formats.peft import PeftCheckpoint, PeftFormat
from mergekit_lowrank.formats.peft_config import CONFIG_NAME, PeftConfig
from mergekit_lowrank.formats.peft_keys import tensor_names
from mergekit_lowrank.formats.peft_output import config_text, output_config
from mergekit_lowrank.formats.stream import SafetensorsHeader, SafetensorsStream
from mergekit_lowrank.formats.tensors import DTYPES, TensorSource, TensorSpec, open_tensors

__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "TIMINGS_NAME",
    "WORK_DIRECTORY",
    "Adapter",
    "Checkpoint",
    "FineTune",
    "Format",
    "ModelDirectory",
    "ModelLayout",
    "ModelWriter",
    "ModuleHeader",
    "PeftCheckpoint",
    "PeftConfig",
    "PeftFormat",
    "SafetensorsHeader",
    "SafetensorsStream",
    "TensorSource",
    "TensorSpec",
    "WholeModel",
    "WholeModelFormat",
    "config_text",
    "empty_directory",
    "new_directory",
    "open_tensors",
    "output_config",
    "partial_path",
    "shared_directory",
    "tensor_names",
    "write_text",
    "writing",
]
