"""Planning a merge from headers, and running it in bounded memory."""

from mergekit_lowrank.engine.artefacts import ARTEFACT_FILE
from mergekit_lowrank.engine.devices import select_device
from mergekit_lowrank.engine.inputs import open_checkpoint, open_inputs
from mergekit_lowrank.engine.memory import default_memory_bytes, format_bytes
from mergekit_lowrank.engine.merging import ModuleRecord
from mergekit_lowrank.engine.pipeline import run_plan
from mergekit_lowrank.engine.plan import ModulePlan, Plan, build_plan
from mergekit_lowrank.engine.settings import SettingsResolver
from mergekit_lowrank.engine.sinks import MemorySink, Sink, file_sink

__all__ = [
    "ARTEFACT_FILE",
    "MemorySink",
    "ModulePlan",
    "ModuleRecord",
    "Plan",
    "SettingsResolver",
    "Sink",
    "build_plan",
    "default_memory_bytes",
    "file_sink",
    "format_bytes",
    "open_checkpoint",
    "open_inputs",
    "run_plan",
    "select_device",
]
