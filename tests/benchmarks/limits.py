"""The physical limit of a merge: its inputs read, touched and hashed once, its output written, its least arithmetic."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.benchmarks.measuring import Figures, measured, processors
from tests.benchmarks.shapes import Model, Shape

CHUNK_BYTES = 1 << 20
GEMM_WIDTH = 2048
GEMM_RUNS = 5
SVD_CONSTANT = 20
"""Of n³, for U, Σ and V of a square matrix (Golub and Van Loan, Matrix Computations, section 8.6)."""


def measured_limit(paths: Sequence[str], out: str, output_bytes: int) -> Figures:
    """The components of the limit, one after the other, each on all processors; and the GEMM rate in flops a second.

    ``wall_seconds`` and ``cpu_seconds`` are of reading, hashing and writing; the arithmetic depends on the method.
    """
    files = [str(Path(path) / "adapter_model.safetensors") for path in paths]
    parts = {
        "read_and_touch": measured(lambda: _on_all_processors(_touch, files)),
        "hash": measured(lambda: _on_all_processors(_hash, files)),
        "write": measured(lambda: _write(Path(out), output_bytes)),
    }
    return {
        **{key: sum(part[key] for part in parts.values()) for key in ("wall_seconds", "cpu_seconds")},
        "peak_bytes": max((part["peak_bytes"] for part in parts.values()), key=lambda peak: peak or 0),
        "bytes_read": sum(Path(file).stat().st_size for file in files),
        "bytes_written": output_bytes,
        "parts": {name: part["wall_seconds"] for name, part in parts.items()},
        "gemm_flops_per_second": gemm_rate(),
    }


def _on_all_processors(work: Callable[[str], object], files: Iterable[str]) -> None:
    """A file on each processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(processors()) as pool:
        list(pool.map(work, files))
    torch.set_num_threads(threads)


def _touch(file: str) -> float:
    """The sum of a file's tensors, cast to float32 into one buffer."""
    buffer, total = torch.empty(0), 0.0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            tensor = tensors.get_tensor(name)
            if tensor.numel() > buffer.numel():
                buffer = torch.empty(tensor.numel())
            total += float(buffer[: tensor.numel()].copy_(tensor.reshape(-1)).sum())
    return total


def _hash(file: str) -> str:
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        for chunk in iter(partial(stream.read, CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, size: int) -> None:
    """Random bytes, flushed to the disk as a merge flushes its output, and deleted."""
    chunk = os.urandom(CHUNK_BYTES)
    with path.open("wb") as stream:
        for start in range(0, size, CHUNK_BYTES):
            stream.write(chunk[: size - start])
        stream.flush()
        os.fsync(stream.fileno())
    path.unlink()


def gemm_rate() -> float:
    """Flops a second of a square float32 product, the best of some."""
    left, right = torch.randn(2, GEMM_WIDTH, GEMM_WIDTH)
    seconds = []
    for _ in range(GEMM_RUNS):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_WIDTH**3 / min(seconds)


def _per_entry(flops: int) -> Callable[[Shape, int, int], float]:
    """So many operations for each entry of A and B."""
    return lambda shape, inputs, rank: flops * inputs * rank * sum(shape)


def _bases(shape: Shape, inputs: int, rank: int) -> float:
    """Gram matrices of the stacked factors, an SVD of the core, and the way back to the output's rank."""
    joint = inputs * rank
    return joint**2 * sum(shape) + SVD_CONSTANT * joint**3 + 2 * joint * rank * sum(shape)


def _joint(elementwise: int, side: int) -> Callable[[Shape, int, int], float]:
    """``_bases``, the coordinates R × d of N inputs, ``elementwise`` operations on each, the result's Gram matrix."""

    def flops(shape: Shape, inputs: int, rank: int) -> float:
        joint = inputs * rank
        coordinates = joint * shape[side]
        return _bases(shape, inputs, rank) + coordinates * (2 * joint + elementwise * inputs + joint)

    return flops


def _core(shape: Shape, inputs: int, rank: int) -> float:
    """``_bases`` and N cores of R × R: each a product of two factors, five operations an entry."""
    joint = inputs * rank
    return _bases(shape, inputs, rank) + inputs * joint**2 * (2 * rank + 5)


def _delta(shape: Shape, inputs: int, rank: int) -> float:
    """Every entry of every delta once, five operations on each, and one product of the result with ``rank`` vectors."""
    return shape[0] * shape[1] * (inputs * (2 * rank + 5) + 2 * rank)


_FLOPS: dict[str, Callable[[Shape, int, int], float]] = {
    "robustmerge": _per_entry(4),
    "drm horizontal": _joint(5, 1),
    "drm vertical": _joint(5, 0),
    "linear": _bases,
    "ties": _delta,
    "dare_ties": _delta,
    "linear in factors": _per_entry(2),
    "ties in factors": _per_entry(4),
    "knots": _joint(5, 1),
    "core_ties": _core,
    "tsv": _core,
}


def least_flops(label: str, model: Model, inputs: int, rank: int) -> float:
    """The floating-point work that a method cannot do without, over all modules; counts are of leading terms."""
    return sum(count * _FLOPS[label](shape, inputs, rank) for shape, count in model.counts.items())


def limit_seconds(limit: dict[str, Any], flops: float) -> float:
    """Reading, hashing, writing and the arithmetic at the measured rate."""
    return limit["wall_seconds"] + flops / limit["gemm_flops_per_second"]
