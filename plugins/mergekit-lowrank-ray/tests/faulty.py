"""A method that takes its worker down with it, once; and one that waits. Workers import it from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mergekit_lowrank import ElementwiseStrategy, hookimpl
from mergekit_lowrank.executors import Work

DIRECTORY = "FAULTY_DIRECTORY"
"""Names the environment variable that says where the methods leave their notes."""


def noted(name: str) -> bool:
    """Whether a note of this name was there already; if not, it is now."""
    path = Path(os.environ[DIRECTORY]) / name
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


class Mean(ElementwiseStrategy):
    name = "calm"
    summary = "the mean"

    def merge_block(self, block, weights, context):
        return block.mean(dim=0)


class Dying(Mean):
    name = "dying"

    def merge_block(self, block, weights, context):
        if context.module.startswith("layers.2") and not noted("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().merge_block(block, weights, context)


class Mortal(Mean):
    """Every worker that begins it dies."""

    name = "mortal"

    def merge_block(self, block, weights, context):
        os.kill(os.getpid(), signal.SIGKILL)


class Waiting(Mean):
    """Its modules end only when there is a note that says so."""

    name = "waiting"

    def merge_block(self, block, weights, context):
        import ray

        directory = Path(os.environ[DIRECTORY])
        noted(f"at {ray.get_runtime_context().get_node_id()}")
        while not (directory / "go").exists():
            time.sleep(0.02)
        return super().merge_block(block, weights, context)


class Refusing(Mean):
    name = "refusing"

    def merge_block(self, block, weights, context):
        if context.module == "layers.1.q":
            raise ValueError("no idea what to do")
        time.sleep(0.1)
        return super().merge_block(block, weights, context)


class Place(Work):
    """Where a job runs, and which GPUs it is shown there."""

    needs_gpu = False

    def read(self, job):
        return None

    def run(self, job, inputs):
        import ray

        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")


class PlaceWithGpu(Place):
    needs_gpu = True


class Plugin:
    @hookimpl
    def strategies(self):
        return [Mean, Dying, Mortal, Waiting, Refusing]
