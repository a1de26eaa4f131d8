"""Full fine-tunes: whole models, merged as the difference of their weights to those of their base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.filenames import ADAPTER_CONFIG, MODEL_CONFIG
from mergekit_lowrank.formats.base import ADD_BASE, Checkpoint, Format, ModuleHeader
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.parameters import Renaming, is_output, matrix_shape
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.lowrank import StreamedUpdate, blocks_of_rows

__all__ = ["FineTune", "WholeModel", "WholeModelFormat"]

_BLOCK_ENTRIES = 1 << 20


class WholeModel(Checkpoint):
    """A model whose base is not known yet: its headers are those of its own weights.

    Args:
        model: its directory.
        label: what messages call it.
        location: the path as given.
    """

    def __init__(self, model: ModelDirectory, *, label: str, location: str) -> None:
        self.model = model
        self.label = label
        self.location = location
        self.files = model.files
        self.modules = model.modules
        self.base_model = None
        self.fan_in_fan_out = model.fan_in_fan_out
        self.config = model.config
        self.needs_base = "it is a whole model, of which the difference to its base is merged"

    def against(self, base: ModelDirectory, dtype: torch.dtype) -> FineTune:
        """What was changed in the base to give this model.

        Args:
            base: that of the recipe.
            dtype: of the rows that its updates give.

        Raises:
            CheckpointError: the base has other parameters (named).
        """
        return FineTune(self, base, dtype)

    def read(self, module: str) -> StreamedUpdate:
        """Nothing: without a base there is no update.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.model.where}: {self.needs_base}, and no base is given. {ADD_BASE}.")


class FineTune(Checkpoint):
    """A whole model as the difference W − W0 to its base, module by module, in blocks of rows. Can be pickled.

    Modules are called as in the base, and are (d_out, d_in) as those of adapters even where weights are stored as
    (in, out). Tensors that are tied are one module, under the name that stands for them in the base. Integers, masks
    and buffers are no parameters: they are neither compared nor merged, and either side may lack them.

    Args:
        whole: the model.
        base: what it was tuned from.
        dtype: of the rows that its updates give.

    Attributes:
        base: what it is compared with.

    Raises:
        CheckpointError: parameters that one of the two lacks, or that have another shape; all of them.
    """

    def __init__(self, whole: WholeModel, base: ModelDirectory, dtype: torch.dtype) -> None:
        self.label = whole.label
        self.location = whole.location
        self.files = whole.files
        self.base_model = None
        self.fan_in_fan_out = base.fan_in_fan_out
        self.config = whole.config
        self._model, self.base, self._dtype = whole.model, base, dtype
        self._own = _matched(whole.model, base)
        self.modules: dict[str, ModuleHeader] = {
            module: _header(whole.model.modules[own], base.modules[module]) for module, own in self._own.items()
        }

    def read(self, module: str) -> StreamedUpdate:
        """The difference of one module, which reads the rows of both models each time that it is asked for them."""
        header, rows = self.modules[module], self._columns if self.base.is_transposed(module) else self._rows
        return StreamedUpdate((header.d_out, header.d_in), self._dtype, torch.device("cpu"), partial(rows, module))

    @property
    def is_outline(self) -> bool:
        """Whether data of the model or the base were left on the Hugging Face Hub."""
        return self._model.source.is_outline or self.base.source.is_outline

    def own_rows(self, module: str, where: slice) -> Tensor:
        """Rows of the fine-tuned parameter itself, as it is stored.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        return self._model.read_rows(self._model.key_of(self._own[module]), where)

    def _rows(self, module: str, where: slice) -> Tensor:
        """Rows of the difference of the matrices as they are stored, all finite.

        Subtracted in float32, or in float64 where one of the three types is.
        """
        own_key, base_key = self._model.key_of(self._own[module]), self.base.key_of(module)
        own, base = self._model.read_rows(own_key, where), self.base.read_rows(base_key, where)
        wide = torch.float64 if torch.float64 in {own.dtype, base.dtype, self._dtype} else torch.float32
        widened = own.to(wide)  # what is read may be a map of the file
        difference = (widened - base.to(wide) if widened is own else widened.sub_(base.to(wide))).to(self._dtype)
        _check_finite(difference, ((self._model, own_key, own), (self.base, base_key, base)), where)
        return difference

    def _columns(self, module: str, where: slice) -> Tensor:
        """Rows of the transposed difference; its stored rows are read whole, some at a time."""
        header = self.modules[module]
        blocks = blocks_of_rows((header.d_in, header.d_out), _BLOCK_ENTRIES)
        return torch.cat([self._rows(module, block)[:, where] for block in blocks]).T.contiguous()


class WholeModelFormat(Format):
    """Directories written by ``PreTrainedModel.save_pretrained``."""

    name: ClassVar[str] = "model"
    summary: ClassVar[str] = "a whole model: config.json with model.safetensors or pytorch_model.bin, whole or sharded"

    def recognises(self, path: Path) -> bool:
        """Whether the directory holds a model's configuration and weights, and no adapter."""
        if not (path / MODEL_CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file():
            return False
        return any(
            file.is_file() for pattern in ("model*.safetensors*", "pytorch_model*.bin*") for file in path.glob(pattern)
        )

    def open(self, path: Path, *, label: str) -> WholeModel:
        """The model in ``path``, still without its base."""
        return WholeModel(ModelDirectory(path, where=f"model '{label}'"), label=label, location=str(path))


def _header(own: ModuleHeader, base: ModuleHeader) -> ModuleHeader:
    """That of the difference: the base's, but for how the fine-tune is stored."""
    return replace(base, dtype=own.dtype, stored_bytes=own.stored_bytes)


def _matched(model: ModelDirectory, base: ModelDirectory) -> dict[str, str]:
    """By module of the base, what the model calls it, in the order of the model's files."""
    own_names, base_names = _distinct(model), dict.fromkeys(_distinct(base))
    renaming = Renaming.between(own_names, base_names)
    own = {renaming(name): name for name in own_names}
    lacking = [name for name in base_names if name not in own]
    for name in [name for name in own if name not in base_names]:
        twin = next((other for other in lacking if _are_aliases(model, own[name], base, other)), None)
        if twin is not None:
            lacking.remove(twin)
            own = {twin if key == name else key: value for key, value in own.items()}
    _check_parameters(model, base, own, lacking)
    return own


def _distinct(model: ModelDirectory) -> list[str]:
    """The model's modules, one of those that are tied."""
    copies = {model.module_of(key) for group in model.tied for key in group[1:]}
    return [name for name in model.modules if name not in copies]


def _are_aliases(model: ModelDirectory, own: str, base: ModelDirectory, other: str) -> bool:
    """Whether one tied parameter goes by two names, as where each of the two files left out another copy."""
    own_key, base_key = model.key_of(own), base.key_of(other)
    are_tied = model.may_be_tied(own_key) and base.may_be_tied(base_key)
    return are_tied and model.source.specs[own_key].shape == base.source.specs[base_key].shape


def _check_parameters(
    model: ModelDirectory, base: ModelDirectory, own: Mapping[str, str], lacking: Sequence[str]
) -> None:
    """Raise what the model has and the base has not, and the reverse, and what differs in shape."""
    findings = Findings(model.where)
    for name, own_name in own.items():
        key = model.key_of(own_name)
        if name not in base.modules:
            _add_unmatched(findings, key, "parameters that the base lacks", "remove what was added, such as a new head")
        elif (shape := model.source.specs[key].shape) != (expected := base.source.specs[base.key_of(name)].shape):
            findings.add(
                "parameters of another shape than in the base",
                f"'{key}' ({list(shape)}, base {list(expected)})",
                "Give the base that it was tuned from. A vocabulary that was resized cannot be merged: resize it back.",
            )
    for name in lacking:
        _add_unmatched(
            findings, base.key_of(name), "parameters of the base that it lacks", "save the whole model again"
        )
    findings.raise_all()


def _add_unmatched(findings: Findings, key: str, what: str, remedy: str) -> None:
    if is_output(key):
        findings.add(
            "output layers that are tied to the embedding in it or in the base, but not in both",
            f"'{key}'",
            "Save both models with the same 'tie_word_embeddings'.",
        )
    else:
        findings.add(what, f"'{key}'", f"Give the base that it was tuned from, or {remedy}.")


def _check_finite(difference: Tensor, sources: Sequence[tuple[ModelDirectory, str, Tensor]], where: slice) -> None:
    """Raise what holds NaN or Inf, if the difference does: the fine-tune, the base, or only the difference."""
    if math.isfinite(difference.sum()) or bool(difference.isfinite().all()):  # a sum may overflow by itself
        return
    for model, key, rows in sources:
        count = int((~rows.double().isfinite()).sum())
        if count:
            first, end, _ = where.indices(matrix_shape(model.source.specs[key].shape)[0])
            raise CheckpointError(
                f"{model.where}: tensor '{key}' holds {count} NaN or infinite values in rows {first} to {end - 1}. "
                "A merge would spread them: train or save the model again."
            )
    (model, key, _), dtype = sources[0], str(difference.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"{model.where}: tensor '{key}' differs from the base by more than {dtype} can hold: merge with "
        "'dtype: float64'."
    )
