"""What the engine asks of a checkpoint: its headers at once, its tensors one module at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from mergekit_lowrank.lowrank import InputUpdate

__all__ = ["Checkpoint", "Format", "ModuleHeader"]


@dataclass(frozen=True)
class ModuleHeader:
    """What is known of one module of one input before any tensor is read.

    Attributes:
        name: the module's name in the base model, such as ``model.layers.3.self_attn.q_proj``.
        d_out: rows of the delta.
        d_in: columns of the delta.
        rank: r, read from the tensors, never from the configuration; min(d_out, d_in) of a dense update.
        scaling: what multiplies b · a; 1 of a dense update.
        dtype: the stored type; the wider one where the two factors differ.
        stored_bytes: bytes of both factors, or of the whole tensor, in the file.
        is_dense: whether the update is a difference of whole weights, which is read in blocks of rows.
        kind: ``matrix``: the weight of a linear layer, which adapters change too; ``embedding``: a table with a row for
            each token or position; ``vector``: any other parameter, merged entry by entry, such as norms and biases.
    """

    name: str
    d_out: int
    d_in: int
    rank: int
    scaling: float
    dtype: torch.dtype
    stored_bytes: int
    is_dense: bool = False
    kind: Literal["matrix", "vector", "embedding"] = "matrix"


class Checkpoint(ABC):
    """One input, opened: its headers are read, its tensors are not. Safe to read from several threads.

    Attributes:
        label: what messages call it: the directory's name, made unique by the caller.
        location: the path or repository as the recipe gave it.
        files: every file the input consists of, for hashing; empty for an in-memory input.
        modules: its modules by name, in the order in which their tensors lie in the file.
        base_model: the base it was tuned from, as its configuration says; None when it does not.
        revision: the revision of that base; None when unknown.
        task_type: PEFT's task type, such as ``CAUSAL_LM``; None when unknown.
        fan_in_fan_out: whether the base stores its weights as (in, out); the factors do not change with it.
        config: the configuration as stored, for the report and the output's configuration.
    """

    label: str
    location: str
    files: tuple[Path, ...]
    modules: Mapping[str, ModuleHeader]
    base_model: str | None
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    config: Mapping[str, object]

    @property
    def identity(self) -> object:
        """Equal for two checkpoints that are one: the same files, links resolved, or the same tensors in memory."""
        return tuple(sorted(path.resolve() for path in self.files)) or id(self)

    @abstractmethod
    def read(self, module: str) -> InputUpdate:
        """The update of one module: factors on the CPU in their stored type, both finite, or a dense update to stream.

        A dense update reads its files when rows of it are asked for, and raises its errors then.

        Raises:
            CheckpointError: a factor holds NaN or Inf (the tensor is named), or the file cannot be read.
        """


class Format(ABC):
    """Recognises and opens one kind of checkpoint."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether ``path`` looks like this format. Reads file names only."""

    @abstractmethod
    def open(self, path: Path, *, label: str) -> Checkpoint:
        """The checkpoint at ``path``, headers read and checked.

        Raises:
            CheckpointError: it is corrupt, or holds something that is not handled (named).
        """
