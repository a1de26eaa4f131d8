"""A GPU made of the CPU: tensors that say they are elsewhere, counted bytes, and failures on demand.

Its tensors wrap ones of the CPU and name a device that torch knows but nothing here has. Every operation on them is
checked as a GPU would check it: operands elsewhere are refused, and so is memory beyond the capacity.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_lowrank.engine.devices import Device

FAKE = "lazy"
"""The only device type whose kernels may be missing: torch asks nothing of it."""
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_")
"""Operations that take tensors of the CPU beside those of a GPU."""
READ_AT_ONCE = (Tensor.tolist, Tensor.untyped_storage)


class FakeTensor(Tensor):
    """A tensor of a ``FakeDevice``."""

    inner: Tensor
    fake: FakeDevice

    @staticmethod
    def __new__(cls, inner: Tensor, fake: FakeDevice) -> FakeTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=fake.torch,
        )
        made.inner, made.fake = inner, fake
        fake.hold(made)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ_AT_ONCE:
            return func(args[0].inner)
        if func is Tensor.new_tensor:
            return func(args[0].inner, *args[1:], **(kwargs or {})).to(args[0].device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands: list[Tensor] = []
        _inner((args, list((kwargs or {}).values())), operands)
        found = next(tensor for tensor in operands if isinstance(tensor, FakeTensor))
        return found.fake.compute(func, args, kwargs or {})


class _Active(TorchDispatchMode):
    """New tensors may be made on the device."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first error would import the compiler, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fake.compute(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """``torch.tensor`` asks no dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.tensor:
            return func(*args, **(kwargs or {}))
        options = dict(kwargs or {})
        place = options.pop("device", torch.device("cpu"))
        return func(*args, **options).to(place)


class FakeDevice(Device):
    """A GPU made of the CPU.

    Attributes:
        capacity_bytes: what fits.
        held_bytes: what its tensors take now.
        peak_bytes: the most they ever took.
        prepared: how often it was made ready.
        recoveries: the bytes that were held each time it was told to recover.
        operations: how often each was done.
    """

    def __init__(self, index: int = 0, capacity_bytes: int | None = None) -> None:
        super().__init__(torch.device(FAKE, index))
        self.capacity_bytes, self.held_bytes, self.peak_bytes = capacity_bytes, 0, 0
        self.prepared = 0
        self.recoveries: list[int] = []
        self.operations: defaultdict[str, int] = defaultdict(int)
        self._failures: dict[str, Iterator[type[BaseException]]] = {}
        self._storages: dict[int, list[int]] = {}
        self._lock = threading.RLock()

    def fail(self, operation: str, error: type[BaseException], times: int = 1) -> None:
        """Raise the error so often when an operation such as ``aten::_linalg_svd`` is asked for; then work again."""
        self._failures[operation] = repeat(error, times)

    def sent_here(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        return FakeTensor(tensor.clone(), self)

    def prepare(self) -> None:
        self.prepared += 1

    def limit(self, vram_bytes: int) -> None:
        self.capacity_bytes = min(vram_bytes, self.capacity_bytes or vram_bytes)

    def free_bytes(self) -> int | None:
        return None if self.capacity_bytes is None else self.capacity_bytes - self.held_bytes

    @contextmanager
    def active(self) -> Iterator[None]:
        with _FromData(), _Active(self):
            yield

    def recover(self) -> None:
        self.recoveries.append(self.held_bytes)

    def hold(self, tensor: FakeTensor) -> None:
        storage = tensor.inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key not in self._storages:
                self._refuse(size)
                self._storages[key] = [0, size]
                self.held_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            self._storages[key][0] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        with self._lock:
            self._storages[key][0] -= 1
            if not self._storages[key][0]:
                self.held_bytes -= self._storages.pop(key)[1]

    def _refuse(self, size: int) -> None:
        if self.capacity_bytes is not None and self.held_bytes + size > self.capacity_bytes:
            raise torch.cuda.OutOfMemoryError(f"{self.name} is out of memory: {size} bytes were asked for")

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation, done on the CPU; its results are of this device where its operands are, or it names it."""
        operands: list[Tensor] = []
        inner_args = _inner(args, operands)
        inner_kwargs = {name: _inner(value, operands) for name, value in kwargs.items()}
        place = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not any(isinstance(tensor, FakeTensor) for tensor in operands) and (place is None or place.type != FAKE):
            return func(*args, **kwargs)
        self._check(func.name().split(".")[0], operands, place)
        if place is not None:
            inner_kwargs["device"] = torch.device("cpu")
        found = func(*inner_args, **inner_kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return found if place is not None and place.type != FAKE else self._wrapped(found)

    def _wrapped(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            return FakeTensor(found, self)
        return type(found)(map(self._wrapped, found)) if isinstance(found, list | tuple) else found

    def _check(self, name: str, operands: list[Tensor], place: torch.device | None) -> None:
        with self._lock:
            self.operations[name] += 1
            error = next(self._failures.get(name, iter(())), None)
        if error is not None:
            raise error(f"{name} fails on demand")  # a new one: it holds the frames it goes through
        places = [tensor.device for tensor in operands if tensor.dim() and name not in MAY_MIX]
        places += [place] if place is not None and place.type == FAKE else []
        if any(other != self.torch for other in places):
            raise RuntimeError(f"{name}: expected all tensors on {self.torch}, found {', '.join(map(str, places))}")


def _inner(value: Any, operands: list[Tensor]) -> Any:
    """The value with tensors of the CPU in place of those of a device, which are gathered."""
    if isinstance(value, Tensor):
        operands.append(value)
        return value.inner if isinstance(value, FakeTensor) else value
    return type(value)(_inner(item, operands) for item in value) if isinstance(value, list | tuple) else value


def on_every_thread(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives on so many threads that start together."""
    barrier, found = threading.Barrier(count), [None] * count

    def run(n: int) -> None:
        barrier.wait()
        try:
            found[n] = work(n)
        except BaseException as error:
            found[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
