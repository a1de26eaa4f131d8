"""One CPU or accelerator: how updates get there, what it may hold, and when it has run out of memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_lowrank.errors import RecipeError, causes
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, converted

__all__ = ["CpuDevice", "CudaDevice", "Device", "MpsDevice", "select_devices"]

DType: TypeAlias = torch.dtype  # a device has an attribute called torch
Place: TypeAlias = torch.device

OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED")
"""In messages of plain RuntimeErrors: of the CUDA driver, of cuBLAS and cuSOLVER, of MPS."""


class Device:
    """One CPU or accelerator that modules are merged on. It can be pickled.

    Attributes:
        torch: as torch knows it.
    """

    def __init__(self, place: Place) -> None:
        self.torch = place

    def __reduce__(self) -> tuple[type[Device], tuple[Place]]:
        return type(self), (self.torch,)

    @property
    def name(self) -> str:
        """As people call it: ``cpu``, ``cuda:1``."""
        return str(self.torch)

    def prepare(self) -> None:
        """Load, once in a process, what several threads would load at once."""

    def limit(self, vram_bytes: int) -> None:
        """Let this process hold no more than that on the device; more is refused as if there were no memory left."""

    def free_bytes(self) -> int | None:
        """What can be held there now; None where the memory is the machine's, which the executor counts."""
        return None

    def active(self) -> AbstractContextManager[object]:
        """Within it this thread works on the device."""
        return nullcontext()

    def sent(self, tensor: Tensor, dtype: DType) -> Tensor:
        """A tensor on the device in ``dtype``; shared where it is both already."""
        return tensor.to(self.torch, dtype)

    def placed(self, update: InputUpdate, dtype: DType) -> InputUpdate:
        """The update on the device in ``dtype``; rows of a streamed one are sent block by block, as they are read."""
        if isinstance(update, LowRankUpdate):
            return replace(update, b=self.sent(update.b, dtype), a=self.sent(update.a, dtype))
        return replace(update, dtype=dtype, device=self.torch, read=lambda rows: self.sent(update.read(rows), dtype))

    def upload(self, updates: Sequence[InputUpdate], dtype: DType) -> list[InputUpdate]:
        """The updates of one module on the device in ``dtype``."""
        return [self.placed(update, dtype) for update in updates]

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error``, or one that it was raised from, says that the device has no memory left."""
        return any(
            isinstance(raised, torch.cuda.OutOfMemoryError)  # torch.OutOfMemoryError from torch 2.5 on
            or (isinstance(raised, RuntimeError) and any(sign in str(raised) for sign in OUT_OF_MEMORY))
            for raised in causes(error)
        )

    def recover(self) -> None:
        """Give back what is kept for later, after an error that is gone."""


class CpuDevice(Device):
    """The processors of this machine. Their memory has a budget of its own, and nothing to fall back to."""

    def __init__(self, place: Place | None = None) -> None:
        super().__init__(place or torch.device("cpu"))

    def upload(self, updates: Sequence[InputUpdate], dtype: DType) -> list[InputUpdate]:
        """The updates in ``dtype``, factors of one shape as slices of one stack."""
        return converted(updates, dtype)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Never."""
        return False


class CudaDevice(Device):
    """One GPU of CUDA or ROCm."""

    @cached_property
    def _uploads(self) -> torch.cuda.Stream:
        """Copies run beside whatever is computed, all in one stream, whose freed memory the next one takes."""
        return torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Load the libraries: torch's first CUDA decomposition fails if it is not alone."""
        torch.linalg.inv(torch.ones(1, 1, device=self.torch))
        _ = self._uploads

    def limit(self, vram_bytes: int) -> None:
        """Let torch's allocator hold no more. The CUDA context and its libraries, 0.3 to 0.6 GiB, are beside it."""
        total = torch.cuda.get_device_properties(self.torch).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total), self.torch)

    def free_bytes(self) -> int | None:
        """What no process holds."""
        return int(torch.cuda.mem_get_info(self.torch)[0])

    def active(self) -> AbstractContextManager[object]:
        """``cuda`` without a number is this GPU."""
        return torch.cuda.device(self.torch)

    def sent(self, tensor: Tensor, dtype: DType) -> Tensor:
        """A tensor in ``dtype``: sent in its stored type from pinned memory, without waiting, and widened there."""
        if tensor.device.type != "cpu":
            return tensor.to(self.torch, dtype)
        computing = torch.cuda.current_stream(self.torch)
        with torch.cuda.stream(self._uploads):
            copy = tensor.pin_memory().to(self.torch, non_blocking=True)
        computing.wait_stream(self._uploads)
        copy.record_stream(computing)
        return copy.to(dtype)

    def recover(self) -> None:
        """Give unused memory back to the driver."""
        gc.collect()
        torch.cuda.empty_cache()


class MpsDevice(Device):
    """The GPU of an Apple machine, which shares its memory."""

    def limit(self, vram_bytes: int) -> None:
        """Let torch's allocator hold no more.

        Raises:
            RecipeError: torch is too old to tell how much there is.
        """
        if not hasattr(torch.mps, "recommended_max_memory"):
            raise RecipeError(
                "'vram' cannot be limited on mps by torch before 2.5; leave it out, or install a newer one"
            )
        torch.mps.set_per_process_memory_fraction(min(1.0, vram_bytes / torch.mps.recommended_max_memory()))

    def sent(self, tensor: Tensor, dtype: DType) -> Tensor:
        """A tensor in ``dtype``.

        Raises:
            RecipeError: it is float64, which MPS does not have.
        """
        if dtype == torch.float64:
            raise RecipeError("device 'mps' has no float64; set dtype: float32, or device: cpu")
        return super().sent(tensor, dtype)

    def recover(self) -> None:
        """Give unused memory back to the system."""
        gc.collect()
        torch.mps.empty_cache()


def select_devices(name: str) -> tuple[Device, ...]:
    """The devices called ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; auto is every GPU of CUDA, else the CPU.

    Raises:
        RecipeError: there is no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"unknown device '{name}'; expected auto, cpu, cuda, cuda:N or mps") from error
    found = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if place.type not in found:
        raise RecipeError(f"device '{name}' is not supported; expected auto, cpu, cuda, cuda:N or mps")
    if (place.index or 0) >= found[place.type]:
        raise RecipeError(f"device '{name}' was asked for, but this machine has {found[place.type]} of its kind")
    if place.type == "cuda":
        return tuple(CudaDevice(torch.device("cuda", n)) for n in range(gpus) if place.index in (None, n))
    return (CpuDevice(),) if place.type == "cpu" else (MpsDevice(place),)
