"""Writing a LoRA for llama.cpp: one GGUF file, with the base's weights named and ordered as llama.cpp has them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError, OutputError
from mergekit_lowrank.formats.base import Checkpoint, Extra, ModuleHeader, Writer
from mergekit_lowrank.formats.directory import writing
from mergekit_lowrank.formats.gguf_names import BaseModel, base_config_of
from mergekit_lowrank.formats.layouts import Embedding, Linear
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.lowrank import LowRankUpdate

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["GGUF_NAME", "GgufWriter"]

GGUF_NAME = "adapter.gguf"
"""The file that is written."""

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class _Pair:
    """One module as two tensors of the file.

    Attributes:
        module: its name in the base model.
        name: the weight in llama.cpp, such as ``blk.0.attn_q.weight``.
        heads: within which the rows of B are reordered; None where they are not.
        ratio: what B is multiplied with, so that alpha over the rank is left as scaling.
        header: of the module.
    """

    module: str
    name: str
    heads: int | None
    ratio: float
    header: ModuleHeader

    @property
    def names(self) -> tuple[str, str]:
        """Of the tensors, that of A first."""
        return f"{self.name}.lora_a", f"{self.name}.lora_b"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the tensors, that of A first. llama.cpp looks rows of an embedding up in A, so there it is (vocab, r)."""
        header = self.header
        if isinstance(header.layout, Embedding):
            return (header.d_out, header.rank), (header.d_in, header.rank)
        return (header.rank, header.d_in), (header.d_out, header.rank)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the tensors, that of A first: as stored, and float32 for a product that might be rounded."""
        stored = self.header.dtype
        is_exact = self.ratio == 1 or (abs(math.frexp(self.ratio)[0]) == 0.5 and stored != torch.float16)
        return stored, stored if is_exact else torch.float32

    def tensors(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """Both of them, that of A first."""
        is_embedding = isinstance(self.header.layout, Embedding)
        a, b = (update.b, update.a.T) if is_embedding else (update.a, _by_pairs(update.b, self.heads))
        scaled = b if self.ratio == 1 else b.double() * self.ratio
        a_dtype, b_dtype = self.dtypes
        return a.to(a_dtype).contiguous(), scaled.to(b_dtype).contiguous()


@dataclass(frozen=True)
class _Planned:
    """The file as its header says it: ``general.architecture``, ``adapter.lora.alpha``, and pairs in their order."""

    architecture: str
    alpha: float
    pairs: Sequence[_Pair]


class GgufWriter(Writer):
    """``adapter.gguf``: what ``llama-server --lora`` loads.

    llama.cpp multiplies with alpha over the rank of each tensor, and has one alpha. Where all modules agree on it, as
    in what this package merges, both factors are stored as they are. Where one needs another, its B is multiplied with
    the ratio: exactly for a power of two, else rounded once, to float32.

    Args:
        base_config: ``config.json`` of the base model; else it is looked for where the adapter says its base is.

    Raises:
        OutputError: the package ``gguf`` is not installed.

    Source: ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp`` of llama.cpp, November 2026; gguf 0.19.
    """

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = f"a LoRA for llama.cpp: {GGUF_NAME}, with the weights as llama.cpp names and orders them"

    def __init__(self, base_config: Mapping[str, object] | None = None) -> None:
        _require_gguf()
        self._base_config = base_config

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise for all that llama.cpp has no place for, and for a base that is missing or not known."""
        self._planned(checkpoint)

    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Write ``adapter.gguf``, one module at a time."""
        planned = self._planned(checkpoint)
        partial = directory / f".{GGUF_NAME}.partial"
        with writing(directory / GGUF_NAME):
            _write(partial, checkpoint, planned)
            partial.replace(directory / GGUF_NAME)

    def _planned(self, checkpoint: Checkpoint) -> _Planned:
        where = f"adapter '{checkpoint.label}'"
        _refuse(checkpoint, where)
        base = BaseModel(self._base_config or base_config_of(checkpoint.base_model, where=where), where=where)
        names = _names(checkpoint, base, where)
        alpha = _alpha(checkpoint.modules.values())
        pairs = [
            _Pair(module, names[module], base.heads_of(module), _product(header) / alpha, header)
            for module, header in checkpoint.modules.items()
        ]
        _check_heads(pairs, where)
        return _Planned(base.architecture.name, alpha, pairs)


def _write(path: Path, checkpoint: Checkpoint, planned: _Planned) -> None:
    from gguf import GGUFWriter

    file = GGUFWriter(path, planned.architecture)
    try:
        _describe(file, checkpoint, planned.alpha)
        _announce(file, planned.pairs)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for pair in planned.pairs:
            for tensor in _read(checkpoint, pair):
                file.write_tensor_data(tensor.view(torch.uint8).numpy())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def _describe(file: GGUFWriter, checkpoint: Checkpoint, alpha: float) -> None:
    """What llama.cpp checks (type, architecture), reads (alpha) and shows (names)."""
    from gguf import GGUFType, Keys

    file.add_type(GGUFType.ADAPTER)
    file.add_string(Keys.Adapter.TYPE, "lora")
    file.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    file.add_name(checkpoint.label)
    if checkpoint.base_model:
        file.add_base_model_count(1)
        file.add_base_model_name(0, checkpoint.base_model.rstrip("/").rsplit("/", 1)[-1])
        if _HUB_ID.fullmatch(checkpoint.base_model) and not Path(checkpoint.base_model).exists():
            file.add_base_model_repo_url(0, _HUB + checkpoint.base_model)


def _announce(file: GGUFWriter, pairs: Sequence[_Pair]) -> None:
    """The header of every tensor, so that their data can follow one by one."""
    from gguf import GGMLQuantizationType

    for pair in pairs:
        for name, shape, dtype in zip(pair.names, pair.shapes, pair.dtypes, strict=True):
            size_bytes = math.prod(shape) * dtype.itemsize
            kind = GGMLQuantizationType[_TYPES[dtype]]
            file.add_tensor_info(name, shape, np.dtype(np.float32), size_bytes, raw_dtype=kind)


def _read(checkpoint: Checkpoint, pair: _Pair) -> Iterator[Tensor]:
    update = checkpoint.read(pair.module)
    assert isinstance(update, LowRankUpdate)  # noqa: S101 - dense ones were refused
    for name, tensor in zip(pair.names, pair.tensors(update), strict=True):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"adapter '{checkpoint.label}': '{name}' overflows float32 once its scaling is in it. "
                "Resize or merge the adapter, which balances its factors."
            )
        yield tensor


def _refuse(checkpoint: Checkpoint, where: str) -> None:
    """Raise for all that llama.cpp has no place for."""
    findings = Findings(where)
    if checkpoint.needs_base:
        findings.add("an update that is not low-rank without the base", checkpoint.needs_base, _EXTRACT)
    for extra in checkpoint.extras.values():
        what, advice = _foreign(extra)
        findings.add(what, f"'{extra.name}'", advice)
    for module, header in checkpoint.modules.items():
        if not isinstance(header.layout, Linear | Embedding) or header.is_dense:
            what, advice = _unlike_linear(header)
            findings.add(f"{what}, which llama.cpp does not load", f"'{module}'", advice)
        elif header.dtype not in _TYPES:
            what = f"factors of a type that llama.cpp does not compute with ({header.dtype})"
            findings.add(what, f"'{module}'", "Merge with out_dtype: float32, float16 or bfloat16.")
    findings.raise_all()


_FOLD = "Fold the adapter into the base model (output: {kind: model}) and convert that instead."
_COPY = (
    "If no tokens were added they are copies: save again with save_pretrained(…, save_embedding_layers=False). "
    f"If some were: {_FOLD[0].lower()}{_FOLD[1:]}"
)
_EXTRACT = "Extract a plain LoRA first (mergekit-lowrank extract), or fold it into the base model."


def _unlike_linear(header: ModuleHeader) -> tuple[str, str]:
    if header.kind == "vector":
        return "biases (lora_bias)", _FOLD
    if header.is_dense:
        return "updates of whole weights", _EXTRACT
    return "factors of convolutions or fused experts", _FOLD


def _foreign(extra: Extra) -> tuple[str, str]:
    if extra.tokens is not None:
        return "rows of embeddings, which llama.cpp does not load", _FOLD
    if extra.name.endswith(".bias"):
        return "biases, which llama.cpp does not load", _FOLD
    if ".base_layer." in extra.key:
        return "weights of the base saved beside their factors, which llama.cpp does not load", _COPY
    return "whole tensors (modules_to_save), which llama.cpp does not load", _FOLD


def _names(checkpoint: Checkpoint, base: BaseModel, where: str) -> dict[str, str]:
    """llama.cpp's name of each module."""
    names, findings = base.names(checkpoint.modules), Findings(where)
    for module, header in checkpoint.modules.items():
        if base.is_tied and (isinstance(header.layout, Embedding) or module.rsplit(".", 1)[-1] == "lm_head"):
            what = "a module whose weight is input embedding and output layer at once, and one tensor in llama.cpp"
            findings.add(what, f"'{module}'", _FOLD)
        elif module not in names:
            what = f"modules that llama.cpp does not know in a base of type '{base.architecture.name}'"
            findings.add(what, f"'{module}'", "Check that the base model is the one that the adapter was tuned from.")
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    for module in (module for module, name in names.items() if name in shared):
        what = "modules that have one name in llama.cpp"
        findings.add(what, f"'{module}' ({names[module]})", "The adapter holds modules of two bases: take them apart.")
    findings.raise_all()
    return names


def _check_heads(pairs: Sequence[_Pair], where: str) -> None:
    findings = Findings(where)
    for pair in pairs:
        if pair.heads is not None and pair.header.d_out % (2 * pair.heads):
            found = f"'{pair.module}' ({pair.header.d_out} rows, {pair.heads} heads)"
            findings.add("modules whose rows are not heads of the base", found, "Give the config.json of its own base.")
    findings.raise_all()


def _product(header: ModuleHeader) -> float:
    """The alpha that a module asks for, as precise as the file holds it."""
    return float(np.float32(header.scaling * header.rank))


def _alpha(headers: Iterable[ModuleHeader]) -> float:
    """What most modules ask for. Never 0, which llama.cpp reads as scaling 1."""
    products = Counter(map(_product, headers))
    return next((alpha for alpha, _ in products.most_common() if alpha), 1.0)


def _by_pairs(b: Tensor, heads: int | None) -> Tensor:
    """The rows of each head, its two halves interleaved.

    Source: ``LlamaModel.permute`` of llama.cpp's converter.
    """
    if heads is None:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OutputError(
            "the format 'gguf' is written with the package gguf, which is not installed: "
            "pip install 'mergekit-lowrank[gguf]'."
        ) from error
