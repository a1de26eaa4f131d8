"""Which device merges a module, and what is tried where it runs out of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from mergekit_lowrank.engine.devices import CpuDevice, Device
from mergekit_lowrank.lowrank.drivers import fallbacks
from mergekit_lowrank.spaces.base import DEVICE_BLOCK_ENTRIES, device_blocks

__all__ = ["HALVINGS", "DevicePool", "attempt"]

HALVINGS = 4
"""How often the blocks of a module that does not fit are halved, from 64 MiB to 4 MiB in float32, before it goes to the
CPU. A merge holds two to six of them (measured), so that smaller ones would free little beside factors and result."""

BLOCKS_BYTES = 6 * 4 * DEVICE_BLOCK_ENTRIES
"""What those blocks take on a GPU, in float32, beside what a plan counts, whose blocks are those of a CPU."""

Result = TypeVar("Result")


@dataclass
class _Load:
    """What a device does now.

    Attributes:
        device: itself.
        room_bytes: what may be promised on it; None for any amount.
        promised_bytes: to the modules that are on it.
        modules: how many those are.
    """

    device: Device
    room_bytes: int | None
    promised_bytes: int = 0
    modules: int = 0

    def fits(self, need_bytes: int) -> bool:
        return self.room_bytes is None or not self.modules or self.promised_bytes + need_bytes <= self.room_bytes

    def count(self, modules: int, need_bytes: int) -> None:
        self.modules += modules
        self.promised_bytes += need_bytes


class DevicePool:
    """The devices of one process; modules take them in turn: the one with the least bytes promised, then the first.

    They are made ready when the first module comes. A pool that is sent to another process starts anew there.
    """

    def __init__(self, devices: Sequence[Device], vram_bytes: int | None = None) -> None:
        """A pool.

        Args:
            devices: one or more.
            vram_bytes: what this process may hold on each; None for what is free there.
        """
        self.devices, self.vram_bytes = tuple(devices), vram_bytes
        self._loads: list[_Load] = []
        self._changed = threading.Condition()

    def of_worker(self, worker: int, workers: int) -> DevicePool:
        """What one of several processes has of them: a device, which it shares with every so-many-th of the others.

        Args:
            worker: its number, from 0.
            workers: how many there are.
        """
        number = worker % len(self.devices)
        sharing = max(1, len(range(number, workers, len(self.devices))))
        return DevicePool([self.devices[number]], None if self.vram_bytes is None else self.vram_bytes // sharing)

    @property
    def has_gpus(self) -> bool:
        """Whether any of them is a GPU of CUDA."""
        return any(device.torch.type == "cuda" for device in self.devices)

    def __reduce__(self) -> tuple[type[DevicePool], tuple[Sequence[Device], int | None]]:
        return type(self), (self.devices, self.vram_bytes)

    @contextmanager
    def device_for(self, need_bytes: int) -> Iterator[Device]:
        """A device on which ``need_bytes`` are promised until the end; waits for one. A single module always fits.

        A thread that is within it must not enter it again: two would wait for each other.
        """
        with self._changed:
            load = self._changed.wait_for(lambda: self._least_loaded(need_bytes))
            assert load is not None  # noqa: S101 - it was waited for
            load.count(1, need_bytes)
        try:
            yield load.device
        finally:
            with self._changed:
                load.count(-1, -need_bytes)
                self._changed.notify_all()

    def _least_loaded(self, need_bytes: int) -> _Load | None:
        self._loads = self._loads or [self._ready(device) for device in self.devices]
        fitting = [load for load in self._loads if load.fits(need_bytes)]
        return min(fitting, key=lambda load: (load.promised_bytes, load.modules), default=None)

    def _ready(self, device: Device) -> _Load:
        device.prepare()
        if self.vram_bytes is not None:
            device.limit(self.vram_bytes)
        free = device.free_bytes()
        return _Load(device, free if free is None or self.vram_bytes is None else min(free, self.vram_bytes))


def attempt(
    pool: DevicePool, work: Callable[[Device], Result], *, need_bytes: int = 0
) -> tuple[Result, tuple[str, ...]]:
    """What ``work`` gives on a device of the pool, and what went differently than planned, for the report.

    Where the device runs out of memory, the work is done again from its start: in blocks of half the size up to
    ``HALVINGS`` times, then on the CPU. Other errors are raised.

    Args:
        pool: the devices.
        work: done on the device it is given, maybe several times, so that all it changes must come out the same, as
            rows of a file do. It returns no tensor of the device: the memory there is promised to another module.
        need_bytes: what it holds at most on a CPU.
    """
    with pool.device_for(need_bytes + BLOCKS_BYTES if pool.has_gpus else need_bytes) as device:
        for halvings in range(HALVINGS + 1):
            try:
                result, told = _done(device, work, DEVICE_BLOCK_ENTRIES >> halvings)
            except Exception as error:
                if not device.is_out_of_memory(error):
                    raise
            else:
                return result, (*_about_blocks(device, halvings), *told)
            device.recover()  # not before the error is gone, which holds the frames that hold the tensors
    result, told = _done(CpuDevice(), work, DEVICE_BLOCK_ENTRIES)
    smallest = DEVICE_BLOCK_ENTRIES >> HALVINGS
    return result, (f"{device.name} ran out of memory, even in blocks of {smallest} entries: merged on the CPU", *told)


def _done(device: Device, work: Callable[[Device], Result], entries: int) -> tuple[Result, tuple[str, ...]]:
    with device.active(), device_blocks(entries), fallbacks() as told:
        result = work(device)
        return result, tuple(told)


def _about_blocks(device: Device, halvings: int) -> Iterator[str]:
    if halvings:
        planned, entries = DEVICE_BLOCK_ENTRIES, DEVICE_BLOCK_ENTRIES >> halvings
        yield f"{device.name} ran out of memory: merged in blocks of {entries} entries in place of {planned}"
