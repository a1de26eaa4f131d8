"""What the engine asks of a checkpoint: its headers at once, its tensors one module at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mergekit_lowrank.formats.layouts import LINEAR, Layout
from mergekit_lowrank.lowrank import InputUpdate

__all__ = ["ADD_BASE", "Checkpoint", "Derived", "Extra", "Format", "ModuleHeader", "Writer"]

if TYPE_CHECKING:
    from mergekit_lowrank.formats.model import ModelDirectory

ADD_BASE = "Add 'base_model', the path of the model that it was tuned from, to the recipe"


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
        layout: how the update lies in the tensors of a PEFT adapter.
        replaces: whether its values stand in the place of the base's: they are averaged, whatever the method.
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
    layout: Layout = LINEAR
    replaces: bool = False


@dataclass(frozen=True)
class Extra:
    """A tensor of an adapter that is no low-rank factor: it replaces a parameter of the base, or rows of one.

    Attributes:
        name: the parameter in the base, such as ``lm_head.weight``; for a side file, the tensor's name in it.
        key: its name in the file.
        dtype: the stored type.
        shape: as stored.
        tokens: the rows of the parameter that it replaces, in the order of its own rows; None where it is all of it.
        saved_under: what ``modules_to_save`` calls its module; None where it does not.
        in_side_file: whether it lies in LLaVA's ``non_lora_trainables.bin``.
    """

    name: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    saved_under: str | None = None
    in_side_file: bool = False


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
        extras: what it holds beside low-rank factors, by ``Extra.name``; mostly nothing.
        needs_base: why its updates can be computed only with the base model at hand; None where they need none.
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
    extras: Mapping[str, Extra] = MappingProxyType({})
    needs_base: str | None = None

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

    def against(self, base: ModelDirectory, dtype: torch.dtype) -> Checkpoint:
        """The checkpoint with its base at hand, whose updates can be read; itself where it needs none.

        Args:
            base: what it was tuned from.
            dtype: of the rows that dense updates give.

        Raises:
            CheckpointError: the base does not fit (modules or parameters are named).
        """
        return self

    def read_extra(self, name: str, where: slice) -> Tensor:
        """Rows of one of ``extras``, as a matrix (rows, columns) in its stored type; a vector is one row.

        Raises:
            CheckpointError: the file cannot be read.
        """
        raise KeyError(name)


class Derived(Checkpoint):
    """A checkpoint that shows another in a different way; what it does not override is the other's.

    Args:
        origin: the other.
    """

    def __init__(self, origin: Checkpoint) -> None:
        self.label, self.location, self.files = origin.label, origin.location, origin.files
        self.base_model, self.revision = origin.base_model, origin.revision
        self.task_type, self.fan_in_fan_out = origin.task_type, origin.fan_in_fan_out
        self.config, self.modules, self.extras = origin.config, origin.modules, origin.extras
        self.origin = origin

    @property
    def identity(self) -> object:
        """That of the other."""
        return self.origin.identity

    def read(self, module: str) -> InputUpdate:
        """As the other has it."""
        return self.origin.read(module)

    def read_extra(self, name: str, where: slice) -> Tensor:
        """As the other has it."""
        return self.origin.read_extra(name, where)


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


class Writer(ABC):
    """Writes an adapter in one dialect, factors and scaling as they are: a conversion loses nothing."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise what ``write`` would raise, as far as headers tell it; nothing is read.

        Raises:
            CheckpointError: the adapter holds something that the dialect has no place for (named).
        """
        del checkpoint

    @abstractmethod
    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Write the adapter's files into a directory that exists.

        Raises:
            CheckpointError: it holds something that the dialect has no place for (named); nothing is left out.
            OutputError: the disk is full or failed.
        """
