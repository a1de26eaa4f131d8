"""What the execution section of a recipe may say: with what the merge is run, which never changes what it gives."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from mergekit_lowrank.recipe.sizes import Size, bytes_of
from mergekit_lowrank.recipe.strict import Strict, expected, told_as
from mergekit_lowrank.recipe.values import Text

__all__ = ["Execution"]

DEVICES = ("auto", "cpu", "cuda", "mps")


def _is_a_device(name: str) -> str:
    if name not in DEVICES and not re.fullmatch(r"cuda:\d{1,3}", name, re.ASCII):
        raise expected("a device")
    return name


class Execution(Strict):
    """What a merge may use. Options of the command line and arguments in Python win over it."""

    memory: Size | None = Field(
        default=None,
        description="What the merge may hold, as in `2GiB`. When left out, a quarter of the machine's memory.",
    )
    vram: Size | None = Field(
        default=None,
        description="What it may hold on each GPU, as in `6GiB`. When left out, what is free there.",
    )
    device: (
        Annotated[
            str,
            AfterValidator(_is_a_device),
            told_as("'auto', 'cpu', 'cuda' (all GPUs), 'cuda:N' (one) or 'mps'"),
        ]
        | None
    ) = Field(
        default=None, description="`auto`, `cpu`, `cuda` (all GPUs), `cuda:1` (one) or `mps`; `auto` if left out."
    )
    executor: Text | None = Field(
        default=None,
        description="How modules are scheduled: `threads`, `processes`, `serial` or a plugin's; `threads` if left out.",
    )
    workers: Annotated[int, Field(ge=1), told_as("a whole number of at least 1")] | None = Field(
        default=None,
        description="How many modules are merged at once. When left out, one for each processor.",
    )

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` as a number of bytes."""
        return bytes_of(self.memory)

    @property
    def vram_bytes(self) -> int | None:
        """``vram`` as a number of bytes."""
        return bytes_of(self.vram)
