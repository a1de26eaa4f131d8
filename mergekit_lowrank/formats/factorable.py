"""Fine-tunes that become adapters: what is stored as factors, and what lies beside these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from mergekit_lowrank.formats.base import Derived, Extra
from mergekit_lowrank.formats.fine_tune import FineTune
from mergekit_lowrank.formats.layouts import PREFIX, Embedding
from mergekit_lowrank.formats.parameters import is_output
from mergekit_lowrank.lowrank import InputUpdate, blocks_of_rows

__all__ = ["FactorableFineTune"]

_BLOCK_ENTRIES = 1 << 20


class FactorableFineTune(Derived):
    """The matrices and embeddings of a fine-tune as modules, changed vectors as extras.

    Embeddings, output layers and vectors that are as in the base go. Where the base ties its output layer to the
    embedding, the output layer is a module too: PEFT does not apply the factors of one to the other.

    Args:
        fine_tune: compared with its base.
    """

    def __init__(self, fine_tune: FineTune) -> None:
        super().__init__(fine_tune)
        self._fine_tune = fine_tune
        headers = fine_tune.modules.items()
        matrices = {
            name: own
            for name, own in headers
            if own.kind == "matrix" and (not is_output(name) or _differs(fine_tune, name))
        }
        tables = {name: own for name, own in headers if own.kind == "embedding" and _differs(fine_tune, name)}
        self._copies = {copy: name for name in tables for copy in fine_tune.base.outputs_tied_to(name)}
        self.modules = {
            **{name: replace(own, layout=Embedding()) for name, own in tables.items()},
            **matrices,
            **{copy: replace(tables[name], name=copy, kind="matrix") for copy, name in self._copies.items()},
        }
        vectors = [name for name, own in headers if own.kind == "vector"]
        changed = [name for name in vectors if _differs(fine_tune, name)]
        self.extras = {name: self._extra(name) for name in _with_siblings(changed, vectors)}

    def read(self, module: str) -> InputUpdate:
        """The difference of one module."""
        return self._fine_tune.read(self._copies.get(module, module))

    def read_extra(self, name: str, where: slice) -> Tensor:
        """Rows of the fine-tuned parameter."""
        return self._fine_tune.own_rows(name, where)

    def _extra(self, name: str) -> Extra:
        header, base = self._fine_tune.modules[name], self._fine_tune.base
        owner, _, own = name.rpartition(".")
        shape = base.source.specs[base.key_of(name)].shape
        return Extra(name, PREFIX + name, header.dtype, shape, saved_under=None if own == "bias" else owner)


def _with_siblings(changed: Iterable[str], vectors: Iterable[str]) -> list[str]:
    """What changed, and the other vectors of modules that are saved whole: PEFT loads all of a module or fails."""
    names = {*changed}
    whole = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}
    return [name for name in vectors if name in names or name.rpartition(".")[0] in whole]


def _differs(fine_tune: FineTune, module: str) -> bool:
    """Whether a parameter is another one than in the base. Of an outline nobody knows, so it counts as changed."""
    if fine_tune.is_outline:
        return True
    update = fine_tune.read(module)
    return any(bool(update.rows(block).any()) for block in blocks_of_rows(update.shape, _BLOCK_ENTRIES))
