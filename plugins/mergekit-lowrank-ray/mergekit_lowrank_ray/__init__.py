"""Merges on a Ray cluster."""

from mergekit_lowrank import Executor, hookimpl
from mergekit_lowrank_ray.executor import RayExecutor

__all__ = ["RayExecutor", "executors"]


@hookimpl
def executors() -> list[type[Executor]]:
    """``ray``."""
    return [RayExecutor]
