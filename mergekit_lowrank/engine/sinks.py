"""Where merged modules go: straight to their place in the output, to files of their own, or to memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from xxhash import xxh3_128

from mergekit_lowrank.engine.adapter_files import (
    BLOCK_ENTRIES,
    AdapterFiles,
    Announced,
    announced,
    as_stored,
    padded,
    rows_as_stored,
)
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.spool import ArtefactSpool, digest_of, digests_of, store_module, stored_module
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import (
    TENSOR_FILE,
    WORK_DIRECTORY,
    SafetensorsStream,
    Whole,
    open_tensors,
    slots_of,
    writing,
)
from mergekit_lowrank.formats.stream import bytes_of
from mergekit_lowrank.lowrank import LowRankUpdate, Update, blocks_of_rows

__all__ = ["TENSOR_FILE", "MemorySink", "Receipt", "Sink", "SpoolSink", "StreamSink", "adapter_sink"]

WHOLE = "whole"
"""What a tensor without factors is called in a file of its own."""


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

    def _announced(self, module: str) -> Announced:
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
        return padded(LowRankUpdate(stored["b"], stored["a"]), rank)

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
            updates = [padded(receipts[own.module].payload[0], own.rank) for own in members]
            self.state_dict |= members[0].layout.packed(members, updates)
        for key, (dtype, shape) in announced(slots, self._plan)[1].items():
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
    return _level(ranks, plan)


def factored_ranks(ranks: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Those of modules that are stored as factors."""
    return {name: rank for name, rank in ranks.items() if plan.module(name).is_factored}


def _level(ranks: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Modules whose ranks a configuration says together have one, the largest."""
    largest: dict[str, int] = {}
    for module in plan.modules:
        for target in module.layout.targets(module.name):
            largest[target] = max(largest.get(target, 0), ranks[module.name])
    return {m.name: max(largest[target] for target in m.layout.targets(m.name)) for m in plan.modules}


def _rank_of(update: Update) -> int:
    return update.rank if isinstance(update, LowRankUpdate) else 0
