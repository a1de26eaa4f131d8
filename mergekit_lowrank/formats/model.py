"""A Hugging Face model directory, headers first: parameters as modules, shards, and the small files beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError, nearest_name
from mergekit_lowrank.filenames import ADAPTER_CONFIG, MODEL_CONFIG, MODEL_WEIGHTS
from mergekit_lowrank.formats.base import ModuleHeader
from mergekit_lowrank.formats.checked import read_object
from mergekit_lowrank.formats.parameters import (
    Renaming,
    has_tied_name,
    is_conv1d,
    is_output,
    is_parameter,
    kind_of,
    matrix_shape,
    module_of,
    tie_order,
    ties_outputs,
)
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.formats.quantised import refuse_quantised_config, refuse_quantised_tensors
from mergekit_lowrank.formats.tensors import TensorSource, TensorSpec, open_tensors
from mergekit_lowrank.lowrank import blocks_of_rows

__all__ = ["ModelDirectory"]


_COMPANIONS = (
    "*config.json",
    "config_*.json",
    "modules.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "normalizer.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What a model needs beside its weights, and its licence."""

_WITH_OUTPUT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of models end that have an output layer ``lm_head``."""

_BLOCK_ENTRIES = 1 << 20


class ModelDirectory:
    """Whole weights with their configuration, as ``PreTrainedModel.save_pretrained`` writes them. Can be pickled.

    Every floating-point tensor is a parameter of one module, but for buffers that the model computes by itself. A
    2-D ``X.weight`` is that of module ``X``, as adapters call it; any other parameter is a module by its whole name, as
    a matrix: (1, d) of a vector, (d_0, rest) of what has more than two dimensions.

    Args:
        directory: with ``config.json`` and one of ``MODEL_WEIGHTS``.
        where: what messages call it; "base model 'DIRECTORY'" when left out.

    Attributes:
        config: ``config.json`` as stored.
        source: the tensors.
        modules: its modules by name, in the order in which their tensors lie in the files.
        companions: the small files that belong to the model: configuration, tokenizer, code, licence.
        fan_in_fan_out: whether weights are stored as (in, out), which ``is_transposed`` tells of each module.

    Raises:
        CheckpointError: it is no such directory, or corrupt, or quantised (by name).
    """

    def __init__(self, directory: Path, *, where: str | None = None) -> None:
        self.directory = directory
        self.where = where or f"base model '{directory}'"
        self.config = _read_config(directory, self.where)
        refuse_quantised_config(self.config, where=self.where)
        self.source: TensorSource = open_tensors(_weight_file(directory, self.where))
        refuse_quantised_tensors(self.source.specs, where=self.where)
        _check_types(self.source.specs, self.where)
        self.companions = tuple(_companions(directory))
        self._keys = {module_of(key, spec): key for key, spec in self.source.specs.items() if is_parameter(key, spec)}
        if not self._keys:
            raise CheckpointError(f"{self.where}: {self.source.files[0]} holds no parameters. Download it again.")
        self.modules = {module: self._header(module, key) for module, key in self._keys.items()}
        self.fan_in_fan_out = any(map(self.is_transposed, self.modules))

    @property
    def files(self) -> tuple[Path, ...]:
        """``config.json`` and every file of weights."""
        return (self.directory / MODEL_CONFIG, *self.source.files)

    @property
    def shards(self) -> Mapping[Path, tuple[str, ...]]:
        """The tensors by the file that holds them, in the order of their data."""
        return self.source.shards

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what tells two states of the directory apart without reading weights: sizes, times, headers.

        Raises:
            CheckpointError: a file is gone.
        """
        try:
            stats = [(file, file.stat()) for file in (*self.files, *self.companions)]
        except OSError as error:
            raise CheckpointError(f"{self.where}: cannot be read: {error}.") from error
        facts = [(str(file.relative_to(self.directory)), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
        headers = [(key, str(spec.dtype), spec.shape) for key, spec in self.source.specs.items()]
        return hashlib.sha256(json.dumps([facts, headers]).encode()).hexdigest()

    def key_of(self, module: str) -> str:
        """The tensor of one of ``modules``."""
        return self._keys[module]

    def keys_for(self, modules: Iterable[str]) -> dict[str, str]:
        """The tensors that updates of these modules change, by the names that the inputs use.

        The names are those of this model, or all of them lack, or have too much, one and the same prefix, such as
        ``model.``: adapters say what their model is wrapped in.

        Raises:
            CheckpointError: some are not found, or are tied to an embedding that would change too; all of them.
        """
        wanted, findings = list(modules), Findings(self.where)
        outputs = [name for name in wanted if self.is_tied_output(name)]
        known = self._known
        renaming = Renaming.between([name for name in wanted if name not in outputs], known)
        for name in outputs:
            findings.add(
                "an output layer that is tied to the embedding, which would change with it",
                f"'{name}'",
                "Leave it out of the adapter, or untie the base: save it with tie_word_embeddings=False.",
            )
        found: dict[str, str] = {}
        for name in wanted:
            if renaming(name) in known:
                found[name] = known[renaming(name)]
            elif name not in outputs:
                findings.add("modules that it lacks", f"'{name}'", self._advice_on_missing(wanted, renaming))
        findings.raise_all()
        return found

    @cached_property
    def _known(self) -> dict[str, str]:
        """Tensors by module, and by the names that adapters have for them: of a convolution without ``.weight``."""
        kernels = {key.removesuffix(".weight"): key for key in self._keys.values() if key.endswith(".weight")}
        return {**{key: key for key in self._keys.values()}, **kernels, **self._keys}

    def has(self, module: str) -> bool:
        """Whether it has a parameter of this name, perhaps behind a prefix."""
        return module in self._known or any(key.endswith(f".{module}") for key in self._known)

    def module_of(self, key: str) -> str:
        """The module of a parameter, the inverse of ``key_of``."""
        return module_of(key, self.source.specs[key])

    def matrix_shape(self, key: str) -> tuple[int, int]:
        """(d_out, d_in) of the updates of a parameter."""
        header = self.modules[self.module_of(key)]
        return header.d_out, header.d_in

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of this module is stored as (in, out). Headers say (d_out, d_in) all the same."""
        return is_conv1d(module, self.config)

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of tensors that are one parameter and stored more than once, the one that stands for it first.

        They are known by name (embeddings, and output layers unless the configuration unties them) and by having the
        same values, for which those of one shape are read and compared.
        """
        groups: list[list[str]] = []
        for key in sorted(filter(self.may_be_tied, self._keys.values()), key=tie_order):
            twin = next((group for group in groups if self._are_equal(group[0], key)), None)
            twin.append(key) if twin else groups.append([key])
        return tuple(tuple(group) for group in groups if len(group) > 1)

    def partners(self, key: str) -> tuple[str, ...]:
        """The other tensors that must stay equal to this one."""
        return tuple(other for group in self.tied if key in group for other in group if other != key)

    def outputs_tied_to(self, module: str) -> tuple[str, ...]:
        """The output layers that are one parameter with an embedding, whether they are stored or not."""
        if not ties_outputs(self.config) or tie_order(self._keys[module])[0] >= tie_order("")[0]:
            return ()
        stored = tuple(key.removesuffix(".weight") for key in self.partners(self._keys[module]) if is_output(key))
        if stored or any(map(is_output, self._keys)):
            return stored
        architectures = self.config.get("architectures")
        names = architectures if isinstance(architectures, list) else []
        return ("lm_head",) if any(str(name).endswith(_WITH_OUTPUT) for name in names) else ()

    def table_of(self, output: str) -> str | None:
        """The embedding that is one parameter with an output layer; None where none is."""
        return next((module for module in self._keys if output in self.outputs_tied_to(module)), None)

    def may_be_tied(self, key: str) -> bool:
        """Whether a tensor of this name may be one parameter with another."""
        return ties_outputs(self.config) if is_output(key) else has_tied_name(key)

    def read_rows(self, key: str, where: slice) -> Tensor:
        """Rows of a parameter as the stored matrix that the class describes, on the CPU. Not to be written to.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        if len(self.source.specs[key].shape) < 2:
            return self.source.read(key).reshape(1, -1)[where]
        return self.source.read_rows(key, where).flatten(1)

    def rows(self, module: str, where: slice) -> Tensor:
        """(rows, d_in): rows of the weight as updates have it, even where it is stored as (in, out).

        Raises:
            CheckpointError: the file can no longer be read.
        """
        key = self._keys[module]
        if not self.is_transposed(module):
            return self.read_rows(key, where)
        stored = matrix_shape(self.source.specs[key].shape)
        blocks = blocks_of_rows(stored, _BLOCK_ENTRIES)
        return torch.cat([self.read_rows(key, block)[:, where] for block in blocks]).T.contiguous()

    def _header(self, module: str, key: str) -> ModuleHeader:
        spec = self.source.specs[key]
        rows, columns = matrix_shape(spec.shape)
        d_out, d_in = (columns, rows) if self.is_transposed(module) else (rows, columns)
        return ModuleHeader(
            name=module,
            d_out=d_out,
            d_in=d_in,
            rank=min(d_out, d_in),
            scaling=1.0,
            dtype=spec.dtype,
            stored_bytes=spec.stored_bytes,
            is_dense=True,
            kind=kind_of(key, spec),
        )

    def is_tied_output(self, module: str) -> bool:
        """Whether an output layer is the same parameter as an embedding: stored once, or twice with the same values."""
        if not is_output(module) or not ties_outputs(self.config):
            return False
        return module not in self._keys or any(self._keys[module] in group[1:] for group in self.tied)

    def _are_equal(self, one: str, other: str) -> bool:
        if self.source.specs[one] != self.source.specs[other]:
            return False
        if self.source.is_outline:  # the names and the configuration are all there is to go by
            return True
        blocks = blocks_of_rows(matrix_shape(self.source.specs[one].shape), _BLOCK_ENTRIES)
        return all(
            torch.equal(_bits(self.read_rows(one, block)), _bits(self.read_rows(other, block))) for block in blocks
        )

    def _advice_on_missing(self, wanted: Sequence[str], renaming: Renaming) -> str:
        missing = next(name for name in wanted if renaming(name) not in self._known)
        nearest = nearest_name(missing, self._keys)
        similar = f"The nearest to '{missing}' is '{nearest}'. " if nearest else ""
        return f"{similar}Give the base that the inputs were tuned from; only one prefix of all names may differ."


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, which compare alike where the values are NaN or of a type without comparison."""
    return tensor.contiguous().view(torch.uint8)


def _read_config(directory: Path, where: str) -> dict[str, object]:
    path = directory / MODEL_CONFIG
    if not directory.is_dir():
        raise CheckpointError(
            f"{where}: there is no such directory. Expected a Hugging Face model: a directory with {MODEL_CONFIG} "
            f"and {MODEL_WEIGHTS[0]}, {MODEL_WEIGHTS[2]}, or the index of their shards."
        )
    if not path.is_file():
        advice = (
            f"It is an adapter ({ADAPTER_CONFIG}): give the model that it was tuned from."
            if (directory / ADAPTER_CONFIG).is_file()
            else "Expected a Hugging Face model directory: download it again."
        )
        raise CheckpointError(f"{where}: {directory} has no {MODEL_CONFIG}. {advice}")
    return read_object(path, where=where)


def _weight_file(directory: Path, where: str) -> Path:
    found = next((directory / name for name in MODEL_WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        shards = [path.name for pattern in ("model-*", "pytorch_model-*") for path in sorted(directory.glob(pattern))]
        without = f"; it holds '{shards[0]}', a shard, but no index" if shards else ""
        raise CheckpointError(
            f"{where}: {directory} has none of {', '.join(MODEL_WEIGHTS)}{without}. Download all of it."
        )
    return found


def _check_types(specs: Mapping[str, TensorSpec], where: str) -> None:
    """Raise the weights that are no numbers to add to: packed by something that leaves no other trace."""
    findings = Findings(where)
    for key, spec in specs.items():
        if len(spec.shape) == 2 and key.endswith(".weight") and not spec.dtype.is_floating_point:
            findings.add(
                "weights that are not floating-point numbers",
                f"'{key}' ({str(spec.dtype).removeprefix('torch.')})",
                "Give the model in float32, bfloat16 or float16.",
            )
    findings.raise_all()


def _companions(directory: Path) -> Iterator[Path]:
    found = {path for pattern in _COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    yield from sorted(path for path in found if path.name != ADAPTER_CONFIG)
