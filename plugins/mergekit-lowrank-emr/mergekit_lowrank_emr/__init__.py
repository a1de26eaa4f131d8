"""EMR-Merging for mergekit-lowrank: a unified adapter, and a mask a task that gives the task's adapter back."""

from __future__ import annotations

from mergekit_lowrank import Strategy, hookimpl
from mergekit_lowrank_emr.restoring import restore
from mergekit_lowrank_emr.strategy import Emr

__all__ = ["Emr", "restore", "strategies"]


@hookimpl
def strategies() -> list[type[Strategy]]:
    """EMR."""
    return [Emr]
