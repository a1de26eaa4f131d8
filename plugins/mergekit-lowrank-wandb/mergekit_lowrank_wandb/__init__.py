"""Merges as runs of Weights & Biases."""

from mergekit_lowrank import Reporter, hookimpl
from mergekit_lowrank_wandb.reporter import WandbReporter

__all__ = ["WandbReporter", "reporters"]


@hookimpl
def reporters() -> list[type[Reporter]]:
    """``wandb``."""
    return [WandbReporter]
