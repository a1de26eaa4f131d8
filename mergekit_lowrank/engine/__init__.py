"""Planning a merge from headers, and running it in bounded memory."""

from mergekit_lowrank.engine.budgeting import with_ranks
from mergekit_lowrank.engine.devices import Device, select_devices
from mergekit_lowrank.engine.inputs import Inputs, open_checkpoint, open_inputs
from mergekit_lowrank.engine.memory import default_memory_bytes, format_bytes
from mergekit_lowrank.engine.parts import Origin, Parts, names_of_variants, refuse_parts
from mergekit_lowrank.engine.pipeline import Destination, Outcome, Shard, count_modules, finish, run_plans
from mergekit_lowrank.engine.plan import Fold, ModulePlan, Plan
from mergekit_lowrank.engine.planning import build_plan
from mergekit_lowrank.engine.records import ModuleRecord
from mergekit_lowrank.engine.settings import SettingsResolver
from mergekit_lowrank.engine.sinks import TENSOR_FILE, MemorySink
from mergekit_lowrank.engine.spool import ARTEFACT_FILE
from mergekit_lowrank.engine.targets import (
    PlannedAdapter,
    adapter_config,
    dialect_of,
    loading_server,
    located_base,
    model_config,
)
from mergekit_lowrank.engine.unfinished import PACKAGES, Unfinished, drop_others, identity_of, keeps, open_sink

__all__ = [
    "ARTEFACT_FILE",
    "PACKAGES",
    "TENSOR_FILE",
    "Destination",
    "Device",
    "Fold",
    "Inputs",
    "MemorySink",
    "ModulePlan",
    "ModuleRecord",
    "Origin",
    "Outcome",
    "Parts",
    "Plan",
    "PlannedAdapter",
    "SettingsResolver",
    "Shard",
    "Unfinished",
    "adapter_config",
    "build_plan",
    "count_modules",
    "default_memory_bytes",
    "dialect_of",
    "drop_others",
    "finish",
    "format_bytes",
    "identity_of",
    "keeps",
    "loading_server",
    "located_base",
    "model_config",
    "names_of_variants",
    "open_checkpoint",
    "open_inputs",
    "open_sink",
    "refuse_parts",
    "run_plans",
    "select_devices",
    "with_ranks",
]
