"""Decompositions that go on where a driver fails: with another one, then on the CPU, then in float64.

Each starts with the driver that torch chooses, so that one which converges is what torch gives. What another had to
fall back to is told to whoever listens with ``fallbacks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined] # missing in the stubs of torch

from mergekit_lowrank.errors import StrategyError

__all__ = ["eigh", "eigvalsh", "fallbacks", "qr", "svd", "svdvals"]

SVD_DRIVERS = ("gesvd",)
"""Of cuSOLVER, after torch's choice, Jacobi's method: QR iteration is slower and the surest. gesvda is left out: it
gives not-a-number for singular matrices (pytorch/pytorch#74521)."""
LIBRARIES = ("cusolver", "hipsolver", "magma", "rocsolver")
"""Named in the message of a plain RuntimeError where one of them fails other than by not converging."""

Decompose: TypeAlias = Callable[..., tuple[Tensor, ...]]

_listener: ContextVar[list[str] | None] = ContextVar("fallbacks", default=None)


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """What decompositions of this thread fall back to within it: sentences, each once."""
    told: list[str] = []
    token = _listener.set(told)
    try:
        yield told
    finally:
        _listener.reset(token)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U (m, k), S (k,) and Vᵀ (k, n) of ``matrix`` (m, n), k = min(m, n), S descending.

    Raises:
        StrategyError: no driver converges, as with entries that are not finite. So do the others of this module.
    """
    u, s, vh = _decomposed("singular value decomposition", matrix, _svd, _svd_of_transpose, SVD_DRIVERS)
    return u, s, vh


def svdvals(matrix: Tensor) -> Tensor:
    """The singular values (k,) of ``matrix`` (m, n), k = min(m, n), descending."""
    return _decomposed("singular values", matrix, _svdvals, lambda own: _svdvals(own.T), SVD_DRIVERS)[0]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix; only its lower triangle is read."""
    values, vectors = _decomposed(
        "eigendecomposition", matrix, torch.linalg.eigh, lambda own: torch.linalg.eigh(own.T, UPLO="U")
    )
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (n,), ascending, of a symmetric matrix; only its lower triangle is read."""
    return _decomposed(
        "eigenvalues",
        matrix,
        lambda own: (torch.linalg.eigvalsh(own),),
        lambda own: (torch.linalg.eigvalsh(own.T, UPLO="U"),),
    )[0]


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (m, k) with orthonormal columns and R (k, n) of ``matrix`` (m, n), k = min(m, n)."""
    q, r = _decomposed("QR decomposition", matrix, torch.linalg.qr, torch.linalg.qr)
    return q, r


def _svd(matrix: Tensor, **options: Any) -> tuple[Tensor, ...]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, **options)
    return u, s, vh


def _svd_of_transpose(matrix: Tensor) -> tuple[Tensor, ...]:
    u, s, vh = _svd(matrix.T)
    return vh.T, s, u.T


def _svdvals(matrix: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return (torch.linalg.svdvals(matrix, **options),)


def _decomposed(
    what: str, matrix: Tensor, decompose: Decompose, last: Decompose, drivers: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """The first decomposition that succeeds, in the type and on the device of ``matrix``.

    Args:
        what: its name, for people.
        matrix: to be decomposed.
        decompose: as torch does it; takes ``driver`` on CUDA where there are ``drivers``.
        last: the same of a float64 matrix on the CPU, by another path through LAPACK, since it may have been there.
        drivers: to be tried on CUDA.
    """
    for number, (how, attempt) in enumerate(_ways(matrix, decompose, last, drivers)):
        try:
            found = attempt()
        except RuntimeError as error:
            if not _is_failure(error):
                raise
            continue
        if number:
            _tell(f"the {what} of a {_described(matrix)} matrix failed on {matrix.device}; made {how}")
        return tuple(tensor.to(matrix) for tensor in found)
    raise StrategyError(_nothing_converged(what, matrix))


def _ways(
    matrix: Tensor, decompose: Decompose, last: Decompose, drivers: Sequence[str]
) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    kind = matrix.device.type
    yield "there", partial(decompose, matrix)
    if kind == "cuda":
        for driver in drivers:
            yield f"with the driver {driver}", partial(decompose, matrix, driver=driver)
    if kind != "cpu":
        yield "on the CPU", lambda: decompose(matrix.cpu())
    yield "in float64 on the CPU", lambda: last(matrix.cpu().double())


def _is_failure(error: RuntimeError) -> bool:
    """Whether a driver failed; running out of memory is not its failure."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return isinstance(error, LinAlgError) or any(name in str(error).lower() for name in LIBRARIES)


def _tell(sentence: str) -> None:
    told = _listener.get()
    if told is not None and sentence not in told:
        told.append(sentence)


def _described(matrix: Tensor) -> str:
    return f"{matrix.shape[0]} × {matrix.shape[1]} {str(matrix.dtype).removeprefix('torch.')}"


def _nothing_converged(what: str, matrix: Tensor) -> str:
    found = f"the {what} of a {_described(matrix)} matrix failed on {matrix.device}, and in float64 on the CPU. "
    if not bool(matrix.isfinite().all()):
        return found + "It holds values that are not finite: products of the inputs overflow; set dtype: float64"
    return found + "Its entries are finite; merge this module in another space or by another method, with a rule"
