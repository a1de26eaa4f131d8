"""Merged updates, added to the weights of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128

from mergekit_lowrank.engine.companions import with_tokenizer
from mergekit_lowrank.engine.plan import Fold, Plan
from mergekit_lowrank.engine.sinks import Receipt, Sink
from mergekit_lowrank.engine.spool import ArtefactSpool
from mergekit_lowrank.formats import WORK_DIRECTORY, ModelWriter
from mergekit_lowrank.formats.stream import bytes_of
from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, blocks_of_rows

__all__ = ["FoldSink"]

CHUNK_ENTRIES = 1 << 20
"""Of a base tensor, read and written at once: enough for the system's calls to cost little."""
BLOCK_ENTRIES = 1 << 17
"""Added to at once: few enough for a core's cache."""


class FoldSink(Sink):
    """The output is the base model with the merged updates in it, written in blocks of rows.

    W + ΔW is added in float32 (float64 where either is) and rounded once.

    Args:
        directory: of the output; files that an earlier process left there are gone on with.
        plan: what is merged.
        fold: where it goes.
        creates: whether files that are missing or damaged are made anew.
    """

    def __init__(self, directory: Path, plan: Plan, fold: Fold, *, creates: bool = True) -> None:
        self._fold, self._tokenizer = fold, plan.tokenizer
        self._writer = ModelWriter(directory, fold.layout, fold.base.source, resumes=True, creates=creates)
        self._artefacts = ArtefactSpool(directory, directory / WORK_DIRECTORY, [m.name for m in plan.modules])

    def put(self, module: str, update: LowRankUpdate | DenseUpdate, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Add the update to the base's tensor, and to those that are tied to it."""
        key = self._fold.keys[module]
        digests = {target: self._add(target, update) for target in (key, *self._fold.base.partners(key))}
        return Receipt(module, 0, digests, self._artefacts.put(module, artefacts))

    def copy(self, key: str) -> Receipt:
        """Copy a tensor that no input changes."""
        return Receipt(key, 0, {key: self._writer.copy(key)})

    def holds(self, receipt: Receipt) -> bool:
        """Whether the tensors in the files have these digests."""
        written = all(self._writer.digest(key) == digest for key, digest in receipt.digests.items())
        return written and self._artefacts.digests(receipt.module) == dict(receipt.artefacts)

    def flush(self) -> None:
        """Send what was written to the disk."""
        self._writer.flush()

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Close the files, and write what belongs to them: index, configuration, tokenizer."""
        base = self._fold.base
        companions = {path.relative_to(base.directory).as_posix(): path for path in base.companions}
        self._writer.finish(with_tokenizer(companions, self._tokenizer))
        self._artefacts.finish({module for module, receipt in receipts.items() if receipt.artefacts})
        return {}

    def close(self) -> None:
        """Close all files as they are."""
        self._writer.abandon()

    def _add(self, key: str, update: LowRankUpdate | DenseUpdate) -> str:
        """The digest of what was written."""
        base, hashed = self._fold.base, xxh3_128()
        if base.is_transposed(base.module_of(key)):
            update = update.transposed()
        update = _as_added(update, _wide(update.dtype, base.source.specs[key].dtype))
        for where in blocks_of_rows(update.shape, CHUNK_ENTRIES):
            stored = self._sum(key, where, update)
            hashed.update(bytes_of(stored))
            self._writer.write_rows(key, where.start, stored)
        return hashed.hexdigest()

    def _sum(self, key: str, where: slice, update: LowRankUpdate | DenseUpdate) -> Tensor:
        """Some rows of the changed tensor as it is stored, made in blocks that a core's cache holds."""
        weights = self._fold.base.read_rows(key, where)
        wide = _wide(update.dtype, weights.dtype)
        done = []
        for own in blocks_of_rows((weights.shape[0], weights.shape[1]), BLOCK_ENTRIES):
            rows = slice(where.start + own.start, where.start + own.stop)
            done.append(self._writer.stored(key, _added(weights[own].to(wide, copy=True), update, rows)))
        return torch.cat(done)


def _wide(update: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.float64 if torch.float64 in {update, stored} else torch.float32


def _as_added(update: LowRankUpdate | DenseUpdate, dtype: torch.dtype) -> LowRankUpdate | DenseUpdate:
    """A low-rank update whose rows are products and nothing else, in the type of the sums."""
    if isinstance(update, DenseUpdate):
        return update
    return LowRankUpdate(update.b * update.scaling, update.a).to(update.device, dtype)


def _added(weights: Tensor, update: LowRankUpdate | DenseUpdate, where: slice) -> Tensor:
    """The weights with the update's rows in them. On the CPU a product is added as it is made."""
    if isinstance(update, LowRankUpdate) and update.device == weights.device:
        return weights.addmm_(update.b[where], update.a)
    return weights.add_(update.rows(where).to(weights))
