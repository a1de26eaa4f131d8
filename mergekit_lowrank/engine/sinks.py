"""Where merged modules go: straight to their place in the output, to files of their own, or to memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.engine.spool import ArtefactSpool, digest_of, digests_of, store_module, stored_module
from mergekit_lowrank.errors import DiskError, OutputError
from mergekit_lowrank.formats import WORK_DIRECTORY, SafetensorsStream, tensor_names
from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["TENSOR_FILE", "MemorySink", "Receipt", "Sink", "SpoolSink", "StreamSink", "adapter_sink"]

TENSOR_FILE = "adapter_model.safetensors"


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
        """Complete the output of all these modules; the rank of each as written, padding included."""

    def close(self) -> None:
        """Let go of what is open; the output may be unfinished."""


class AdapterSink(Sink):
    """The output is a file of factors, with artefacts in another beside it.

    Args:
        directory: of the output.
        plan: what is merged.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._path, self._plan = directory / TENSOR_FILE, plan
        self._artefacts = ArtefactSpool(directory, directory / WORK_DIRECTORY, [m.name for m in plan.modules])

    def holds(self, receipt: Receipt) -> bool:
        """Whether factors and artefacts have these digests."""
        return self._holds_factors(receipt) and self._artefacts.digests(receipt.module) == dict(receipt.artefacts)

    @abstractmethod
    def _holds_factors(self, receipt: Receipt) -> bool: ...


class StreamSink(AdapterSink):
    """Every rank is known, so every tensor goes straight to its offset in a file reserved beforehand.

    Args:
        directory: of the output; a file that an earlier process left there is gone on with.
        plan: what is merged.
        ranks: of each module as written.
    """

    def __init__(self, directory: Path, plan: Plan, ranks: Mapping[str, int]) -> None:
        super().__init__(directory, plan)
        self._ranks = dict(ranks)
        tensors = {}
        for module in plan.modules:
            a_name, b_name = tensor_names(module.name)
            rank = ranks[module.name]
            tensors[a_name] = (plan.out_dtype, (rank, module.shape.d_in))
            tensors[b_name] = (plan.out_dtype, (module.shape.d_out, rank))
        metadata = {"format": "pt"}
        try:
            self._stream = SafetensorsStream.reopen(self._path, tensors, metadata=metadata)
        except DiskError:  # which may do better later: what it holds stays
            raise
        except OutputError:  # there is none, or a process was killed while it made it
            self._stream = SafetensorsStream(self._path, tensors, metadata=metadata, counts=False)

    def put(self, module: str, update: LowRankUpdate, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Pad and write both factors at their offsets."""
        a_name, b_name = tensor_names(module)
        b, a = _padded(update.b, update.a, self._ranks[module])
        digests = {a_name: self._stream.write(a_name, a), b_name: self._stream.write(b_name, b)}
        return Receipt(module, update.rank, digests, self._artefacts.put(module, artefacts))

    def _holds_factors(self, receipt: Receipt) -> bool:
        if set(receipt.digests) != set(tensor_names(receipt.module)):  # it is in a file of its own
            return False
        return all(self._stream.digest(name) == digest for name, digest in receipt.digests.items())

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Close the file, and gather the artefacts."""
        self._stream.finish()
        self._artefacts.finish({module for module, receipt in receipts.items() if receipt.artefacts})
        return self._ranks

    def close(self) -> None:
        """Close the file as it is."""
        self._stream.abandon()


class SpoolSink(AdapterSink):
    """Modules wait in files of their own until all are there.

    For ranks that depend on the data, and for workers that share nothing but a file system.
    """

    def put(self, module: str, update: LowRankUpdate, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Write the module to its own file."""
        found = store_module(self._file(module), {"a": update.a, "b": update.b})
        return Receipt(module, update.rank, found, self._artefacts.put(module, artefacts))

    def _holds_factors(self, receipt: Receipt) -> bool:
        return digests_of(self._file(receipt.module)) == dict(receipt.digests)

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Put the modules together, and the artefacts."""
        ranks = settled_ranks({name: receipt.rank for name, receipt in receipts.items()}, self._plan)
        sink = StreamSink(self._path.parent, self._plan, ranks)
        try:
            for module, receipt in receipts.items():
                sink.put(module, self._read(receipt), {})
            return sink.finish(receipts)
        finally:
            sink.close()

    def _read(self, receipt: Receipt) -> LowRankUpdate:
        file = self._file(receipt.module)
        stored = stored_module(file)
        if {name: digest_of(tensor) for name, tensor in stored.items()} != dict(receipt.digests):
            raise OutputError(
                f"{file}: is not what was written there; delete {file.parent.parent.parent}, and merge again"
            )
        return LowRankUpdate(stored["b"], stored["a"])

    def _file(self, module: str) -> Path:
        name = f"{self._plan.positions[module]:06d}.safetensors"
        return self._path.parent / WORK_DIRECTORY / "modules" / name


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

    def put(self, module: str, update: LowRankUpdate, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Hand both factors on."""
        return Receipt(module, update.rank, payload=(update, dict(artefacts)))

    def holds(self, receipt: Receipt) -> bool:
        """Nothing outlives the process."""
        del receipt
        return False

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Pad all factors and name them."""
        ranks = settled_ranks({name: receipt.rank for name, receipt in receipts.items()}, self._plan)
        for module, receipt in receipts.items():
            update, artefacts = receipt.payload
            b, a = _padded(update.b, update.a, ranks[module])
            a_name, b_name = tensor_names(module)
            self.state_dict[a_name], self.state_dict[b_name] = a, b
            self.artefacts |= {f"{module}.{name}": tensor for name, tensor in artefacts.items()}
        return ranks


def adapter_sink(directory: Path, plan: Plan, *, apart: bool) -> Sink:
    """The sink of an adapter in a directory.

    Args:
        directory: of the output.
        plan: what is merged.
        apart: whether each module must have a file of its own until all are there.
    """
    ranks = {module.name: plan.written_rank(module) for module in plan.modules}
    known = {module: rank for module, rank in ranks.items() if rank is not None}
    return SpoolSink(directory, plan) if apart or len(known) < len(ranks) else StreamSink(directory, plan, known)


def settled_ranks(found: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Ranks as written: as planned where planned, else the next accepted one; all equal where uniform."""
    planned = {module.name: plan.written_rank(module) for module in plan.modules}
    ranks = {name: plan.accepted(found[name], name) if rank is None else rank for name, rank in planned.items()}
    if plan.recipe.output.uniform_rank:
        return dict.fromkeys(ranks, max(ranks.values()))
    return ranks


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors with zero columns and rows up to ``rank``, contiguous: the same update."""
    missing = rank - a.shape[0]
    return pad(b, (0, missing)).contiguous(), pad(a, (0, 0, 0, missing)).contiguous()
