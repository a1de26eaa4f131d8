"""What a merge consists of, modules and tensors that are copied, and which of it one of several processes does."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lowrank.engine.plan import Fold, Plan

__all__ = ["Unit", "batches_of", "files_together", "share_of"]

COPY_BYTES = 32 << 20
"""What copying a tensor holds: a few chunks."""


@dataclass(frozen=True)
class Unit:
    """A module to be merged, or a tensor of the base to be copied.

    Attributes:
        name: of the module, or of the tensor.
        size_bytes: read or written for it.
        peak_bytes: what it holds at most.
        scratch_bytes: what lies on disk beside; a GPU has no such thing.
        file: where it goes in a fold, or the first of the files that are written together; empty for an adapter.
        is_copy: whether nothing is merged.
    """

    name: str
    size_bytes: int
    peak_bytes: int
    scratch_bytes: int = 0
    file: str = ""
    is_copy: bool = False


def batches_of(plans: Sequence[Plan]) -> list[list[Unit]]:
    """All units in the order of the files, for merges of the same inputs; those of one file of a fold together.

    One machine at a time must write a file: network file systems write whole pages.
    """
    units = _units(plans)
    if plans[0].fold is None:
        return [[unit] for unit in units]
    files: dict[str, list[Unit]] = {}
    for unit in units:
        files.setdefault(unit.file, []).append(unit)
    return list(files.values())


def files_together(fold: Fold) -> dict[str, str]:
    """Each file of a fold with the first of those that are written together: tied tensors change as one."""
    place = fold.layout.weight_map
    first = {file: file for file in fold.layout.files}
    for key in fold.keys.values():
        for partner in fold.base.partners(key):
            one, other = sorted((first[place[key]], first[place[partner]]))
            first = {file: one if found == other else found for file, found in first.items()}
    return first


def _units(plans: Sequence[Plan]) -> list[Unit]:
    first, fold = plans[0], plans[0].fold
    held = {
        name: (max(p.module(name).peak_bytes for p in plans), max(p.module(name).scratch_bytes for p in plans))
        for name in first.positions
    }
    if fold is None:
        return [Unit(module.name, module.stored_bytes, *held[module.name]) for module in first.modules]
    modules = {key: name for name, key in fold.keys.items()}
    first_file, units = files_together(fold), []
    for file, header in fold.layout.files.items():
        for key in header.specs:
            if key in fold.tied:
                continue
            size, name = fold.base.source.specs[key].stored_bytes, modules.get(key)
            if name is None:
                units.append(Unit(key, size, COPY_BYTES, 0, first_file[file], is_copy=True))
            else:
                units.append(Unit(name, size, *held[name], first_file[file]))
    return units


def share_of(batches: Sequence[list[Unit]], index: int, count: int) -> list[list[Unit]]:
    """The batches of one of ``count`` processes: the largest first, to the least loaded, the same whoever asks.

    Args:
        batches: all of them.
        index: of the process, from 0.
        count: of all processes.
    """
    sizes = [sum(unit.size_bytes for unit in batch) for batch in batches]
    loads = [(0, process) for process in range(count)]
    own = []
    for n in sorted(range(len(batches)), key=lambda n: (-sizes[n], n)):
        load, process = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[n], process))
        if process == index:
            own.append(n)
    return [batches[n] for n in sorted(own)]
