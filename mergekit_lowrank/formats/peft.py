"""PEFT LoRA adapters: a directory with ``adapter_config.json`` and ``adapter_model.*``, or the same in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.filenames import ADAPTER_WEIGHTS, MODEL_CONFIG, SIDE_FILE
from mergekit_lowrank.formats.base import Checkpoint, Extra, Format, ModuleHeader
from mergekit_lowrank.formats.checked import finite, read_object
from mergekit_lowrank.formats.dora import DoraCheckpoint
from mergekit_lowrank.formats.layouts import Expert, Whole
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.peft_config import CONFIG_NAME, PeftConfig
from mergekit_lowrank.formats.peft_keys import Contents, Factors, Findings, contents_of
from mergekit_lowrank.formats.tensors import TensorSource, open_tensors
from mergekit_lowrank.formats.variants import UNSUPPORTED, VARIANTS
from mergekit_lowrank.lowrank import InputUpdate, StreamedUpdate

__all__ = ["PeftCheckpoint", "PeftFormat", "open_peft"]


_SAME_SAVE = "Take both files from the same save."

_NEEDS_BASE = (
    "it is a DoRA adapter, which rescales the base's weights, so its update is not low-rank. It is computed exactly "
    "from the base model"
)


class PeftCheckpoint(Checkpoint):
    """A LoRA adapter in PEFT's layout, on disk or in memory.

    ``lora_B.bias`` is an update of its own, of a vector: module ``X.bias`` beside ``X``. Each expert of a fused
    parameter is a module ``X[e]``.

    Args:
        source: its tensors.
        config: its configuration.
        label: what messages call it.
        location: the path as given.
        files: every file it consists of; empty in memory.
        side: the tensors of LLaVA's side file.

    Raises:
        CheckpointError: tensors that nothing handles, or that contradict each other or the configuration.
    """

    def __init__(
        self,
        source: TensorSource,
        config: PeftConfig,
        *,
        label: str,
        location: str,
        files: tuple[Path, ...] = (),
        side: TensorSource | None = None,
    ) -> None:
        self.label = label
        self.location = location
        self.files = files
        self.base_model = config.base_model_name_or_path
        self.revision = config.revision
        self.task_type = config.task_type
        self.fan_in_fan_out = config.fan_in_fan_out
        self.config = config.raw
        self._source, self._side = source, side
        self._where = f"adapter '{label}'"
        contents = contents_of(source.specs, config, where=self._where)
        self._factors, self._biases = contents.factors, {f"{own}.bias": own for own in contents.biases}
        self._bias_keys = contents.biases
        self.magnitudes = contents.magnitudes
        self.needs_base = _NEEDS_BASE if contents.magnitudes else None
        self.modules = _headers(contents, source, config, self._where)
        self.extras = _by_name(_extras(contents, source, config, side, self._where), self._where)

    @property
    def identity(self) -> object:
        """The files, or in memory the storage of the tensors."""
        return super().identity if self.files else self._source.identity

    def against(self, base: ModelDirectory, dtype: torch.dtype) -> Checkpoint:
        """The adapter with its base at hand: DoRA's updates are dense then.

        Args:
            base: what it was tuned from.
            dtype: of the rows that dense updates give.

        Raises:
            CheckpointError: the base lacks modules, or has other shapes.
        """
        if not self.magnitudes:
            return self
        magnitudes = {name: self._finite(key, self._source.read(key)) for name, key in self.magnitudes.items()}
        return DoraCheckpoint(self, magnitudes, base, dtype)

    def read(self, module: str) -> InputUpdate:
        """The update of one module: both factors as stored and finite, or the bias of ``lora_B``."""
        scaling = self.modules[module].scaling
        if module in self._biases:
            key = self._bias_keys[self._biases[module]]
            bias = self._finite(key, self._source.read(key))
            return StreamedUpdate.of(bias.reshape(1, -1)).scaled(scaling)
        own = self._factors[module]
        rows = slice(None)
        if isinstance(own.layout, Expert):
            rows = slice(own.layout.index * own.rank, (own.layout.index + 1) * own.rank)
        a = self._finite(own.a, self._source.read_rows(own.a, rows))
        return own.layout.update(a, self._finite(own.b, self._source.read(own.b)), scaling)

    def read_extra(self, name: str, where: slice) -> Tensor:
        """Rows of a tensor beside the factors, finite."""
        extra = self.extras[name]
        source = self._side if extra.in_side_file and self._side is not None else self._source
        if len(extra.shape) < 2:
            return self._finite(extra.key, source.read(extra.key).reshape(1, -1)[where])
        return self._finite(extra.key, source.read_rows(extra.key, where).flatten(1))

    def _finite(self, key: str, tensor: Tensor) -> Tensor:
        return finite(tensor, key, where=self._where)


class PeftFormat(Format):
    """Directories written by ``PeftModel.save_pretrained``."""

    name: ClassVar[str] = "peft"
    summary: ClassVar[str] = "PEFT LoRA: adapter_config.json with adapter_model.safetensors or .bin, whole or sharded"

    def recognises(self, path: Path) -> bool:
        """Whether the directory, or one directly in it, holds an adapter's files."""
        return path.is_dir() and (
            any((path / name).is_file() for name in (CONFIG_NAME, *ADAPTER_WEIGHTS)) or bool(_nested_adapters(path))
        )

    def open(self, path: Path, *, label: str) -> Checkpoint:
        """The adapter in ``path``; or the only one in a directory of it, where PEFT puts those with a name."""
        where = f"adapter '{label}'"
        directory = _directory(path, where)
        config_path, tensor_path = directory / CONFIG_NAME, _tensor_file(directory, where)
        raw, source = read_object(config_path, where=where), open_tensors(tensor_path)
        side_path, files = directory / SIDE_FILE, (config_path, *source.files)
        side = open_tensors(side_path) if side_path.is_file() else None
        if side is not None:
            files += (side_path, *(own for own in (directory / MODEL_CONFIG,) if own.is_file()))
        said = f"{where}: {CONFIG_NAME}"
        return open_peft(raw, source, label=label, location=str(path), where=said, files=files, side=side)


def open_peft(
    raw: Mapping[str, object],
    source: TensorSource,
    *,
    label: str,
    location: str,
    where: str,
    files: tuple[Path, ...] = (),
    side: TensorSource | None = None,
) -> Checkpoint:
    """The adapter of a configuration and its tensors, by PEFT's type.

    Args:
        raw: the configuration as stored.
        source: the tensors.
        label: what messages call it.
        location: the path as given.
        where: what messages call the configuration.
        files: every file it consists of; empty in memory.
        side: the tensors of LLaVA's side file.

    Raises:
        CheckpointError: it is of a type that is not handled, or broken.
    """
    kind = str(raw.get("peft_type"))
    if kind in UNSUPPORTED:
        raise CheckpointError(f"{where}: 'peft_type' is '{kind}': {UNSUPPORTED[kind]}")
    if kind not in VARIANTS:
        config = PeftConfig.parse(raw, where=where)
        return PeftCheckpoint(source, config, label=label, location=location, files=files, side=side)
    if side is not None:
        raise CheckpointError(f"{where}: '{SIDE_FILE}' lies beside an adapter of type {kind}; LLaVA writes LORA only.")
    return VARIANTS[kind](raw, source, label=label, location=location, files=files)


def _headers(contents: Contents, source: TensorSource, config: PeftConfig, where: str) -> dict[str, ModuleHeader]:
    """What is known of each module, once the configuration is found not to contradict the tensors."""
    findings = Findings(where)
    headers = dict[str, ModuleHeader]()
    for module, own in contents.factors.items():
        target = next(iter(config.parameters_of(own.layout.path)), module) if isinstance(own.layout, Expert) else module
        claimed = config.rank_of(target)
        if claimed != own.rank:
            findings.add(
                f"{CONFIG_NAME} contradicts the ranks of the tensors",
                f"module '{module}' (configuration {claimed}, tensors {own.rank})",
                "Its scaling would be wrong: correct 'r' or 'rank_pattern', or take both files from the same save.",
            )
        headers[module] = _header(module, own, source, config.scaling_of(target, rank=own.rank))
        if config.use_dora != (module in contents.magnitudes):
            said, found = ("says", "no") if config.use_dora else ("does not say", "a")
            findings.add(
                f"{CONFIG_NAME} {said} 'use_dora', and modules have {found} magnitude", f"'{module}'", _SAME_SAVE
            )
    findings.raise_all()
    for module, key in contents.biases.items():
        spec = source.specs[key]
        headers[f"{module}.bias"] = ModuleHeader(
            name=f"{module}.bias",
            d_out=1,
            d_in=spec.shape[0],
            rank=1,
            scaling=headers[module].scaling,
            dtype=spec.dtype,
            stored_bytes=spec.stored_bytes,
            is_dense=True,
            kind="vector",
            layout=Whole(key, spec.shape),
        )
    return headers


def _header(module: str, own: Factors, source: TensorSource, scaling: float) -> ModuleHeader:
    a, b = source.specs[own.a], source.specs[own.b]
    count = own.layout.count if isinstance(own.layout, Expert) else 1
    return ModuleHeader(
        name=module,
        d_out=own.shape[0],
        d_in=own.shape[1],
        rank=own.rank,
        scaling=scaling,
        dtype=torch.promote_types(a.dtype, b.dtype),
        stored_bytes=(a.stored_bytes + b.stored_bytes) // count,
        layout=own.layout,
    )


def _extras(
    contents: Contents, source: TensorSource, config: PeftConfig, side: TensorSource | None, where: str
) -> Iterator[Extra]:
    """What lies beside the factors."""
    for name, key in contents.whole.items():
        spec, saved = source.specs[key], config.saved_under(name.rpartition(".")[0])
        yield Extra(name, key, spec.dtype, spec.shape, saved_under=saved)
    for module, key in contents.tokens.items():
        spec, tokens = source.specs[key], config.tokens_of(module)
        if tokens is None or len(spec.shape) != 2 or len(tokens) != spec.shape[0]:
            said = "names no rows" if tokens is None else f"names {len(tokens)} rows"
            raise CheckpointError(
                f"{where}: {CONFIG_NAME}: 'trainable_token_indices' {said} of '{module}', and tensor '{key}' is "
                f"{list(spec.shape)}. {_SAME_SAVE}"
            )
        yield Extra(f"{module}.weight", key, spec.dtype, spec.shape, tokens=tokens)
    if side is not None:
        yield from (replace(extra, in_side_file=True) for extra in _side_extras(side))


def _by_name(extras: Iterator[Extra], where: str) -> dict[str, Extra]:
    found = dict[str, Extra]()
    for extra in extras:
        if extra.name in found:
            raise CheckpointError(
                f"{where}: '{extra.name}' is there twice, as tensor '{found[extra.name].key}' and as '{extra.key}'. "
                "Save the adapter again."
            )
        found[extra.name] = extra
    return found


def _side_extras(side: TensorSource) -> Iterator[Extra]:
    """LLaVA strips ``base_model.``, then ``model.`` where any key starts with it twice (llava/model/builder.py)."""
    names = {key: key.removeprefix("base_model.") for key in side.specs}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {key: re.sub("^model[.]", "", name) for key, name in names.items()}
    for key, name in names.items():
        spec = side.specs[key]
        yield Extra(name, key, spec.dtype, spec.shape)


def _nested_adapters(path: Path) -> list[Path]:
    return sorted(config.parent for config in path.glob(f"*/{CONFIG_NAME}"))


def _directory(path: Path, where: str) -> Path:
    """Where the configuration lies."""
    if (path / CONFIG_NAME).is_file():
        return path
    nested = _nested_adapters(path)
    if len(nested) == 1 and not any((path / name).is_file() for name in ADAPTER_WEIGHTS):
        return nested[0]
    if nested:
        names = ", ".join(f"'{directory}'" for directory in nested)
        raise CheckpointError(
            f"{where}: {path} has no {CONFIG_NAME}, but there is one in {names}. PEFT puts adapters that are not "
            "called 'default' in a sub-directory: give that path."
        )
    raise CheckpointError(
        f"{where}: {path} has no {CONFIG_NAME}. Without it the scaling is unknown: download it again."
    )


def _tensor_file(path: Path, where: str) -> Path:
    found = next((path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{where}: {path} has none of {', '.join(ADAPTER_WEIGHTS)}. Download the whole adapter.")
    return found
