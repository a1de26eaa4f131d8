"""Reading and writing checkpoints: headers first, tensors on demand."""

from mergekit_lowrank.formats.adapter import Adapter
from mergekit_lowrank.formats.base import ADD_BASE, Checkpoint, Derived, Extra, Format, ModuleHeader, Writer
from mergekit_lowrank.formats.directory import (
    INDEX_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    REPORT_NAME,
    TIMINGS_NAME,
    WORK_DIRECTORY,
    empty_directory,
    new_directory,
    partial_path,
    shared_directory,
    write_text,
    writing,
)
from mergekit_lowrank.formats.experts import FusedExperts
from mergekit_lowrank.formats.factorable import FactorableFineTune
from mergekit_lowrank.formats.fine_tune import FineTune, WholeModel, WholeModelFormat
from mergekit_lowrank.formats.gguf_output import GGUF_NAME, GgufWriter
from mergekit_lowrank.formats.layouts import (
    LINEAR,
    Convolution,
    Embedding,
    Expert,
    Factored,
    Layout,
    Linear,
    Member,
    TokenRow,
    Whole,
)
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.model_output import ModelLayout, ModelWriter
from mergekit_lowrank.formats.peft import PeftCheckpoint, PeftFormat
from mergekit_lowrank.formats.peft_config import CONFIG_NAME, PeftConfig
from mergekit_lowrank.formats.peft_keys import Findings, tensor_names
from mergekit_lowrank.formats.peft_output import (
    TENSOR_FILE,
    PeftWriter,
    config_text,
    output_config,
    slots_of,
    unloadable,
)
from mergekit_lowrank.formats.stream import SafetensorsHeader, SafetensorsStream
from mergekit_lowrank.formats.tensors import DTYPES, TensorSource, TensorSpec, open_tensors

__all__ = [
    "ADD_BASE",
    "CONFIG_NAME",
    "DTYPES",
    "GGUF_NAME",
    "INDEX_NAME",
    "LINEAR",
    "MANIFEST_NAME",
    "PAGE_NAME",
    "REPORT_NAME",
    "TENSOR_FILE",
    "TIMINGS_NAME",
    "WORK_DIRECTORY",
    "Adapter",
    "Checkpoint",
    "Convolution",
    "Derived",
    "Embedding",
    "Expert",
    "Extra",
    "FactorableFineTune",
    "Factored",
    "Findings",
    "FineTune",
    "Format",
    "FusedExperts",
    "GgufWriter",
    "Layout",
    "Linear",
    "Member",
    "ModelDirectory",
    "ModelLayout",
    "ModelWriter",
    "ModuleHeader",
    "PeftCheckpoint",
    "PeftConfig",
    "PeftFormat",
    "PeftWriter",
    "SafetensorsHeader",
    "SafetensorsStream",
    "TensorSource",
    "TensorSpec",
    "TokenRow",
    "Whole",
    "WholeModel",
    "WholeModelFormat",
    "Writer",
    "config_text",
    "empty_directory",
    "new_directory",
    "open_tensors",
    "output_config",
    "partial_path",
    "shared_directory",
    "slots_of",
    "tensor_names",
    "unloadable",
    "write_text",
    "writing",
]
