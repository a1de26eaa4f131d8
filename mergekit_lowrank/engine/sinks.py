"""Where merged modules go: straight to their place in the file, to a spool, or to memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from mergekit_lowrank.engine.artefacts import ArtefactSpool
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import SafetensorsStream, tensor_names

__all__ = ["MemorySink", "Sink", "SpoolSink", "StreamSink", "file_sink"]


class Sink(AbstractContextManager["Sink"], ABC):
    """Takes merged modules from any thread, in any order. Leaving the context completes the output, or abandons it.

    Attributes:
        ranks: of each module as written, padding included; complete once the context is left.
    """

    ranks: dict[str, int]

    @abstractmethod
    def put(self, module: str, b: Tensor, a: Tensor) -> None:
        """Take the factors of one module, in the stored type on the CPU."""

    @abstractmethod
    def keep(self, module: str, artefacts: Mapping[str, Tensor]) -> None:
        """Take what the strategy returned beside the update of one module."""


class FileSink(Sink):
    """The output is a file, with artefacts in another beside it."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._artefacts = ArtefactSpool(path.parent, [module.name for module in plan.modules])

    def keep(self, module: str, artefacts: Mapping[str, Tensor]) -> None:
        """Spool them."""
        self._artefacts.put(module, artefacts)


class StreamSink(FileSink):
    """Every rank is known, so every tensor goes straight to its offset in a file reserved beforehand."""

    def __init__(self, path: Path, plan: Plan, ranks: Mapping[str, int]) -> None:
        super().__init__(path, plan)
        self.ranks = dict(ranks)
        tensors = {}
        for module in plan.modules:
            a_name, b_name = tensor_names(module.name)
            rank = ranks[module.name]
            tensors[a_name] = (plan.out_dtype, (rank, module.shape.d_in))
            tensors[b_name] = (plan.out_dtype, (module.shape.d_out, rank))
        self._stream = SafetensorsStream(path, tensors, metadata={"format": "pt"})

    def put(self, module: str, b: Tensor, a: Tensor) -> None:
        """Pad and write both factors at their offsets."""
        a_name, b_name = tensor_names(module)
        b, a = _padded(b, a, self.ranks[module])
        self._stream.write(a_name, a)
        self._stream.write(b_name, b)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.__exit__(kind, error, trace)
        if kind is None:
            self._artefacts.finish()


class SpoolSink(FileSink):
    """Ranks depend on the data: modules wait in files of their own until all ranks are known."""

    def __init__(self, path: Path, plan: Plan) -> None:
        super().__init__(path, plan)
        self.ranks = {}
        self._path, self._plan = path, plan
        self._spool = path.parent / "spool"
        self._spool.mkdir()
        self._files = {module.name: self._spool / f"{i:06d}.safetensors" for i, module in enumerate(plan.modules)}

    def put(self, module: str, b: Tensor, a: Tensor) -> None:
        """Write the module to its own file."""
        try:
            save_file({"a": a.contiguous(), "b": b.contiguous()}, self._files[module])
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self._files[module]}: cannot be written: {error}") from error
        self.ranks[module] = a.shape[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self.ranks = _settled(self.ranks, self._plan)
        with StreamSink(self._path, self._plan, self.ranks) as sink:
            for module, file in self._files.items():
                with safe_open(file, framework="pt") as stored:
                    sink.put(module, stored.get_tensor("b"), stored.get_tensor("a"))
                file.unlink()
        self._spool.rmdir()


class MemorySink(Sink):
    """The output is a state dict.

    Attributes:
        state_dict: tensors by PEFT's names; complete once the context is left.
        artefacts: tensors by ``<module>.<name>``.
    """

    def __init__(self, plan: Plan) -> None:
        self.ranks = {}
        self.state_dict: dict[str, Tensor] = {}
        self.artefacts: dict[str, Tensor] = {}
        self._plan = plan
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, module: str, b: Tensor, a: Tensor) -> None:
        """Keep both factors."""
        self._factors[module] = (b, a)
        self.ranks[module] = a.shape[0]

    def keep(self, module: str, artefacts: Mapping[str, Tensor]) -> None:
        """Keep them."""
        self.artefacts |= {f"{module}.{name}": tensor for name, tensor in artefacts.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self.ranks = _settled(self.ranks, self._plan)
        for module in self._plan.modules:
            b, a = _padded(*self._factors.pop(module.name), self.ranks[module.name])
            a_name, b_name = tensor_names(module.name)
            self.state_dict[a_name], self.state_dict[b_name] = a, b


def file_sink(path: Path, plan: Plan) -> Sink:
    """A sink that writes the tensor file at ``path``: directly where every rank is planned, else through a spool."""
    ranks = {module.name: plan.written_rank(module) for module in plan.modules}
    known = {name: rank for name, rank in ranks.items() if rank is not None}
    return StreamSink(path, plan, known) if len(known) == len(ranks) else SpoolSink(path, plan)


def _settled(found: Mapping[str, int], plan: Plan) -> dict[str, int]:
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
