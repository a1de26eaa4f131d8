"""The files of an adapter being written: every tensor in its place, and modules as their tensors hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from xxhash import xxh3_128

from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.provenance import header_metadata
from mergekit_lowrank.errors import DiskError, OutputError
from mergekit_lowrank.filenames import SIDE_FILE
from mergekit_lowrank.formats import (
    TENSOR_FILE,
    WORK_DIRECTORY,
    Convolution,
    Layout,
    Linear,
    Member,
    SafetensorsStream,
    TokenRow,
    Whole,
    slots_of,
    writing,
)
from mergekit_lowrank.formats.layouts import LORA_BIAS
from mergekit_lowrank.formats.stream import bytes_of
from mergekit_lowrank.lowrank import LowRankUpdate, Update, blocks_of_rows

__all__ = ["BLOCK_ENTRIES", "AdapterFiles", "Announced", "announced", "as_stored", "padded", "rows_as_stored"]

SIDE_TENSORS = "side.safetensors"
BLOCK_ENTRIES = 1 << 20
"""Of a tensor without factors, cast and written at once."""

Announced: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor, by name."""


class AdapterFiles:
    """The tensors of an adapter, each in its place in a file reserved beforehand; LLaVA's side file is one of its own.

    Args:
        directory: of the output; files that an earlier process left there are gone on with.
        plan: what is merged.
        ranks: of each module as written; 0 where there are no factors.
    """

    def __init__(self, directory: Path, plan: Plan, ranks: Mapping[str, int]) -> None:
        self._directory, self._plan = directory, plan
        self.members = {member.module: member for member in plan.members(ranks)}
        self.slots = slots_of(self.members.values())
        beside, own = announced(self.slots, plan)
        metadata = header_metadata(plan)
        self._streams = [_stream(directory / TENSOR_FILE, own, metadata)]
        self._side = directory / WORK_DIRECTORY / SIDE_TENSORS
        if beside:
            with writing(self._side):
                self._side.parent.mkdir(parents=True, exist_ok=True)
            self._streams.append(_stream(self._side, beside, metadata))
        self._of = {key: stream for stream in self._streams for key in stream.header.specs}

    def write(self, members: Sequence[Member], updates: Sequence[LowRankUpdate | Tensor]) -> dict[str, str]:
        """The tensors of one slot; their digests."""
        tensors = members[0].layout.packed(members, updates)
        return {key: self._of[key].write(key, tensor) for key, tensor in tensors.items()}

    def write_rows(self, layout: Whole, blocks: Iterable[tuple[int, Tensor]]) -> dict[str, str]:
        """A tensor without factors, in blocks of rows of its matrix from the first on; its digest."""
        hashed = xxh3_128()
        for first, rows in blocks:
            if len(layout.shape) < 2:
                self._of[layout.key].write(layout.key, rows.reshape(layout.shape))
            else:
                self._of[layout.key].write_rows(layout.key, first, rows.reshape(-1, *layout.shape[1:]))
            hashed.update(bytes_of(rows))
        return {layout.key: hashed.hexdigest()}

    def holds(self, module: str, digests: Mapping[str, str]) -> bool:
        """Whether the tensors of a module have these digests; False where they are in a file of their own."""
        member = self.members.get(module)
        if member is None or digests.keys() != member.layout.announced([member]).keys():
            return False
        return all(self._of[key].digest(key) == digest for key, digest in digests.items())

    def flush(self) -> None:
        """Send what was written to the disk."""
        for stream in self._streams:
            stream.flush()

    def finish(self) -> None:
        """Close the files; the side file becomes what LLaVA reads."""
        for stream in self._streams:
            stream.finish()
        if len(self._streams) > 1:
            path = self._directory / SIDE_FILE
            with writing(path):
                torch.save(load_file(self._side), path)

    def close(self) -> None:
        """Close the files as they are."""
        for stream in self._streams:
            stream.abandon()


def _stream(path: Path, tensors: Announced, metadata: Mapping[str, str]) -> SafetensorsStream:
    """The file that an earlier process left there, or a new one."""
    try:
        return SafetensorsStream.reopen(path, tensors, metadata=metadata)
    except DiskError:  # which may do better later: what it holds stays
        raise
    except OutputError:  # there is none, or a process was killed while it made it
        return SafetensorsStream(path, tensors, metadata=metadata, counts=False)


def announced(slots: Mapping[str, Sequence[Member]], plan: Plan) -> tuple[Announced, Announced]:
    """Types and shapes by name: those of the side file, and all others.

    Where one module has a bias of lora_B, peft looks for one in every module that can have it: what nobody writes is
    zero.
    """
    beside, own = Announced(), Announced()
    for members in slots.values():
        layout, dtype = members[0].layout, plan.module(members[0].module).dtype
        into = beside if isinstance(layout, Whole) and layout.in_side_file else own
        into |= {key: (dtype, shape) for key, shape in layout.announced(members).items()}
    if any(key.endswith(LORA_BIAS) for key in own):
        for members in slots.values():
            if isinstance(members[0].layout, Linear | Convolution):
                key = members[0].layout.names(members[0].module)[1].removesuffix(".weight") + ".bias"
                own.setdefault(key, (plan.out_dtype, (members[0].d_out,)))
    return beside, own


def as_stored(update: Update, plan: Plan, module: str, rank: int) -> LowRankUpdate | Tensor:
    """What is written of a merged module: padded factors, or one matrix on the CPU in its stored type.

    Raises:
        OutputError: the stored type cannot hold it.
    """
    own = plan.module(module)
    if own.is_factored:
        assert isinstance(update, LowRankUpdate)  # noqa: S101 - it was cut to a rank
        return padded(update, rank)
    return torch.cat([rows for _, rows in rows_as_stored(update, plan, module)])


def rows_as_stored(update: Update, plan: Plan, module: str) -> Iterator[tuple[int, Tensor]]:
    """What is written of a module without factors: blocks of rows of its matrix on the CPU, in its stored type.

    Raises:
        OutputError: the stored type cannot hold it.
    """
    own = plan.module(module)
    for block in blocks_of_rows((own.shape.d_out, own.shape.d_in), BLOCK_ENTRIES):
        rows = _onto_base(update.rows(block).cpu(), block.start, own.layout, plan)
        rows = (rows if own.dtype.is_floating_point else rows.round()).to(own.dtype)
        if not bool(rows.isfinite().all()):
            name = str(own.dtype).removeprefix("torch.")
            raise OutputError(
                f"module '{module}': the merged values exceed the range of {name}; set out_dtype: bfloat16 or float32"
            )
        yield block.start, rows


def _onto_base(rows: Tensor, first: int, layout: Layout, plan: Plan) -> Tensor:
    """The values themselves, where differences to the base were merged."""
    if not isinstance(layout, Whole | TokenRow) or layout.onto is None or plan.base is None:
        return rows
    first += layout.token if isinstance(layout, TokenRow) else 0
    return rows + plan.base.read_rows(layout.onto, slice(first, first + len(rows))).to(rows.dtype)


def padded(update: LowRankUpdate | Tensor, rank: int) -> LowRankUpdate | Tensor:
    """Both factors with zero columns and rows up to ``rank``, contiguous: the same update. Matrices as they are."""
    if isinstance(update, Tensor):
        return update
    missing = rank - update.rank
    b, a = pad(update.b, (0, missing)).contiguous(), pad(update.a, (0, 0, 0, missing)).contiguous()
    return LowRankUpdate(b, a)
