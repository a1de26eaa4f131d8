"""Where merged modules go: straight to their place in the output, to files of their own, or to memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from xxhash import xxh3_128

from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.provenance import header_metadata
from mergekit_lowrank.engine.spool import ArtefactSpool, digest_of, digests_of, store_module, stored_module
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
    open_tensors,
    slots_of,
    writing,
)
from mergekit_lowrank.formats.layouts import LORA_BIAS
from mergekit_lowrank.formats.stream import bytes_of
from mergekit_lowrank.lowrank import LowRankUpdate, Update, blocks_of_rows

__all__ = ["TENSOR_FILE", "MemorySink", "Receipt", "Sink", "SpoolSink", "StreamSink", "adapter_sink"]

SIDE_TENSORS = "side.safetensors"
WHOLE = "whole"
"""What a tensor without factors is called in a file of its own."""
BLOCK_ENTRIES = 1 << 20
"""Of a tensor without factors, cast and written at once."""


@dataclass(frozen=True, eq=False)
class Receipt:
    """What a worker wrote of one module.

    Attributes:
        module: its name; of a fold perhaps that of a tensor that was copied.
        rank: directions as merged, padding apart; 0 where whole tensors are written.
        digests: xxh3_128 of the bytes written, by tensor name.
        artefacts: the same of what lies beside.
        payload: the tensors themselves where nothing is written.
    """

    module: str
    rank: int
    digests: Mapping[str, str] = field(default_factory=dict)
    artefacts: Mapping[str, str] = field(default_factory=dict)
    payload: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "payload"}


class Sink(ABC):
    """Takes merged modules, from any thread; a copy of it may do so in another process."""

    @abstractmethod
    def put(self, module: str, update: Any, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Take one module as it is stored, and what the strategy returned beside it.

        Raises:
            OutputError: it cannot be written.
        """

    def copy(self, key: str) -> Receipt:
        """Take a tensor of the base as it is; only where the output is the base with the updates in it."""
        raise NotImplementedError(key)

    @abstractmethod
    def holds(self, receipt: Receipt) -> bool:
        """Whether what the receipt tells of is here, to the byte."""

    def flush(self) -> None:
        """See to it that other machines find what this process wrote."""

    @abstractmethod
    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Complete the output of all these modules; the ranks of those with factors as written, padding included."""

    def close(self) -> None:
        """Let go of what is open; the output may be unfinished."""


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
        beside, own = _announced(self.slots, plan)
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


def _stream(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Any:
    try:
        return SafetensorsStream.reopen(path, tensors, metadata=metadata)
    except DiskError:  # which may do better later: what it holds stays
        raise
    except OutputError:  # there is none, or a process was killed while it made it
        return SafetensorsStream(path, tensors, metadata=metadata, counts=False)


def _announced(
    slots: Mapping[str, Sequence[Member]], plan: Plan
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Types and shapes by name: those of the side file, and all others.

    Where one module has a bias of lora_B, peft looks for one in every module that can have it: what nobody writes is
    zero.
    """
    beside, own = dict[str, Any](), dict[str, Any]()
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


class AdapterSink(Sink):
    """The output is a file of factors and of tensors that have none, with artefacts in another beside it.

    Args:
        directory: of the output.
        plan: what is merged.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory, self._plan = directory, plan
        self._artefacts = ArtefactSpool(directory, directory / WORK_DIRECTORY, [m.name for m in plan.modules])

    def holds(self, receipt: Receipt) -> bool:
        """Whether tensors and artefacts have these digests."""
        return self._holds_tensors(receipt) and self._artefacts.digests(receipt.module) == dict(receipt.artefacts)

    @abstractmethod
    def _holds_tensors(self, receipt: Receipt) -> bool: ...


class StreamSink(AdapterSink):
    """Every rank is known and no modules share tensors, so each goes straight to its place.

    Args:
        directory: of the output; files that an earlier process left there are gone on with.
        plan: what is merged.
        ranks: of each module as written.
    """

    def __init__(self, directory: Path, plan: Plan, ranks: Mapping[str, int]) -> None:
        super().__init__(directory, plan)
        self._ranks = dict(ranks)
        self._files = AdapterFiles(directory, plan, ranks)

    def put(self, module: str, update: Update, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Pad and write what is stored of it."""
        member = self._files.members[module]
        if isinstance(member.layout, Whole):
            digests = self._files.write_rows(member.layout, rows_as_stored(update, self._plan, module))
        else:
            digests = self._files.write([member], [as_stored(update, self._plan, module, self._ranks[module])])
        return Receipt(module, _rank_of(update), digests, self._artefacts.put(module, artefacts))

    def _holds_tensors(self, receipt: Receipt) -> bool:
        return self._files.holds(receipt.module, receipt.digests)

    def flush(self) -> None:
        """Send what was written to the disk."""
        self._files.flush()

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Close the files, and gather the artefacts."""
        self._files.finish()
        self._artefacts.finish({module for module, receipt in receipts.items() if receipt.artefacts})
        return factored_ranks(self._ranks, self._plan)

    def close(self) -> None:
        """Close the files as they are."""
        self._files.close()


class SpoolSink(AdapterSink):
    """Modules wait in files of their own until all are there.

    For ranks that depend on the data, for modules that share tensors, and for workers that share nothing but a file
    system.
    """

    def put(self, module: str, update: Update, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Write the module to its own file."""
        if isinstance(self._plan.module(module).layout, Whole):
            found = self._put_rows(module, update)
            return Receipt(module, 0, found, self._artefacts.put(module, artefacts))
        stored = as_stored(update, self._plan, module, _rank_of(update))
        tensors = {"a": stored.a, "b": stored.b} if isinstance(stored, LowRankUpdate) else {WHOLE: stored}
        found = store_module(self._file(module), tensors)
        return Receipt(module, _rank_of(update), found, self._artefacts.put(module, artefacts))

    def _put_rows(self, module: str, update: Update) -> dict[str, str]:
        """Write a tensor without factors to its own file, in blocks; its digest."""
        file, hashed = self._file(module), xxh3_128()
        fresh = file.with_suffix(f".{uuid4().hex}.new")  # a worker that was thought lost may write it too
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with SafetensorsStream(fresh, self._announced(module)) as stream:
            for first, rows in rows_as_stored(update, self._plan, module):
                stream.write_rows(WHOLE, first, rows)
                hashed.update(bytes_of(rows))
        with writing(file):
            fresh.replace(file)
        return {WHOLE: hashed.hexdigest()}

    def _announced(self, module: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        own = self._plan.module(module)
        return {WHOLE: (own.dtype, (own.shape.d_out, own.shape.d_in))}

    def _holds_tensors(self, receipt: Receipt) -> bool:
        if not isinstance(self._plan.module(receipt.module).layout, Whole):
            return digests_of(self._file(receipt.module)) == dict(receipt.digests)
        with suppress(OutputError):
            stream = SafetensorsStream.reopen(self._file(receipt.module), self._announced(receipt.module))
            return {WHOLE: stream.digest(WHOLE)} == dict(receipt.digests)
        return False

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Put the modules together, and the artefacts."""
        ranks = settled_ranks({name: receipt.rank for name, receipt in receipts.items()}, self._plan)
        files = AdapterFiles(self._directory, self._plan, ranks)
        try:
            for members in files.slots.values():
                if isinstance(members[0].layout, Whole):
                    files.write_rows(members[0].layout, self._rows(receipts[members[0].module]))
                else:
                    files.write(members, [self._read(receipts[own.module], own.rank) for own in members])
            files.finish()
        finally:
            files.close()
        self._artefacts.finish({module for module, receipt in receipts.items() if receipt.artefacts})
        return factored_ranks(ranks, self._plan)

    def _rows(self, receipt: Receipt) -> Iterator[tuple[int, Tensor]]:
        if not self._holds_tensors(receipt):
            raise self._damaged(receipt)
        source, own = open_tensors(self._file(receipt.module)), self._plan.module(receipt.module)
        for block in blocks_of_rows((own.shape.d_out, own.shape.d_in), BLOCK_ENTRIES):
            yield block.start, source.read_rows(WHOLE, block)

    def _damaged(self, receipt: Receipt) -> OutputError:
        file = self._file(receipt.module)
        return OutputError(
            f"{file}: is not what was written there; delete {file.parent.parent.parent}, and merge again"
        )

    def _read(self, receipt: Receipt, rank: int) -> LowRankUpdate | Tensor:
        stored = stored_module(self._file(receipt.module))
        if {name: digest_of(tensor) for name, tensor in stored.items()} != dict(receipt.digests):
            raise self._damaged(receipt)
        if WHOLE in stored:
            return stored[WHOLE]
        return _padded(LowRankUpdate(stored["b"], stored["a"]), rank)

    def _file(self, module: str) -> Path:
        name = f"{self._plan.positions[module]:06d}.safetensors"
        return self._directory / WORK_DIRECTORY / "modules" / name


class MemorySink(Sink):
    """The output is a state dict.

    Attributes:
        state_dict: tensors by PEFT's names, once finished.
        artefacts: tensors by ``<module>.<name>``.
    """

    def __init__(self, plan: Plan) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self.artefacts: dict[str, Tensor] = {}
        self._plan = plan

    def put(self, module: str, update: Update, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Hand the update on as it is stored."""
        stored = as_stored(update, self._plan, module, _rank_of(update))
        return Receipt(module, _rank_of(update), payload=(stored, dict(artefacts)))

    def holds(self, receipt: Receipt) -> bool:
        """Nothing outlives the process."""
        del receipt
        return False

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Pad all factors and name the tensors."""
        ranks = settled_ranks({name: receipt.rank for name, receipt in receipts.items()}, self._plan)
        slots = slots_of(self._plan.members(ranks))
        for members in slots.values():
            updates = [_padded(receipts[own.module].payload[0], own.rank) for own in members]
            self.state_dict |= members[0].layout.packed(members, updates)
        for key, (dtype, shape) in _announced(slots, self._plan)[1].items():
            if key not in self.state_dict:
                self.state_dict[key] = torch.zeros(shape, dtype=dtype)
        for module, receipt in receipts.items():
            self.artefacts |= {f"{module}.{name}": tensor for name, tensor in receipt.payload[1].items()}
        return factored_ranks(ranks, self._plan)


def adapter_sink(directory: Path, plan: Plan, *, apart: bool) -> Sink:
    """The sink of an adapter in a directory.

    Args:
        directory: of the output.
        plan: what is merged.
        apart: whether each module must have a file of its own until all are there.
    """
    ranks = {module.name: plan.written_rank(module) for module in plan.modules}
    known = {module: rank for module, rank in ranks.items() if rank is not None}
    are_alone = all(module.layout.slot(module.name) == module.name for module in plan.modules)
    if apart or not are_alone or len(known) < len(ranks):
        return SpoolSink(directory, plan)
    return StreamSink(directory, plan, known)


def settled_ranks(found: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Ranks as written: as planned where planned, else the next accepted one; all equal where uniform."""
    planned = {module.name: plan.written_rank(module) for module in plan.modules}
    ranks = {name: plan.accepted(found[name], name) if rank is None else rank for name, rank in planned.items()}
    if plan.recipe.output.uniform_rank:
        largest = max(ranks.values())
        return {name: largest if plan.module(name).is_factored else 0 for name in ranks}
    return _level_in_slots(ranks, plan)


def factored_ranks(ranks: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Those of modules that are stored as factors."""
    return {name: rank for name, rank in ranks.items() if plan.module(name).is_factored}


def _level_in_slots(ranks: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Modules that share tensors have one rank, the largest."""
    slots = slots_of(plan.members(ranks))
    return {own.module: max(other.rank for other in members) for members in slots.values() for own in members}


def as_stored(update: Update, plan: Plan, module: str, rank: int) -> LowRankUpdate | Tensor:
    """What is written of a merged module: padded factors, or one matrix on the CPU in its stored type.

    Raises:
        OutputError: the stored type cannot hold it.
    """
    own = plan.module(module)
    if own.is_factored:
        assert isinstance(update, LowRankUpdate)  # noqa: S101 - it was cut to a rank
        return _padded(update, rank)
    return torch.cat([rows for _, rows in rows_as_stored(update, plan, module)])


def rows_as_stored(update: Update, plan: Plan, module: str) -> Iterator[tuple[int, Tensor]]:
    """What is written of a module without factors: blocks of rows of its matrix on the CPU, in its stored type.

    Raises:
        OutputError: the stored type cannot hold it.
    """
    own = plan.module(module)
    for block in blocks_of_rows((own.shape.d_out, own.shape.d_in), BLOCK_ENTRIES):
        rows = _onto_base(update.rows(block).cpu(), block.start, own.layout, plan).to(own.dtype)
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


def _rank_of(update: Update) -> int:
    return update.rank if isinstance(update, LowRankUpdate) else 0


def _padded(update: LowRankUpdate | Tensor, rank: int) -> LowRankUpdate | Tensor:
    """Both factors with zero columns and rows up to ``rank``, contiguous: the same update. Matrices as they are."""
    if isinstance(update, Tensor):
        return update
    missing = rank - update.rank
    b, a = pad(update.b, (0, missing)).contiguous(), pad(update.a, (0, 0, 0, missing)).contiguous()
    return LowRankUpdate(b, a)
