"""What a checkpoint holds, how concentrated its updates are, and what a merge makes of it."""

from mergekit_lowrank.inspection.inspecting import inspect
from mergekit_lowrank.inspection.results import AdapterInfo, ExtraInfo, ModuleInfo

__all__ = ["AdapterInfo", "ExtraInfo", "ModuleInfo", "inspect"]
