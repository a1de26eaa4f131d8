"""Drivers fail on demand; the next one gives the same, and what happened is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lowrank import StrategyError
from mergekit_lowrank.lowrank import drivers, fix_signs
from tests.engine.fake_device import on_every_thread

NOT_CONVERGED = torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
CUSOLVER = RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling cusolverDnSgesvdj")
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")


class OnCuda(Tensor):
    """A matrix that says it is on a GPU; its copy on the CPU does not."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)

    def to(self, *_: Any) -> Tensor:
        return self


def matrix(rows: int = 9, columns: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=dtype)


def symmetric(dtype: torch.dtype = torch.float32) -> Tensor:
    own = matrix(6, 6, dtype)
    return own + own.T


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, torch.dtype, str | None]]]:
    """Makes a function of ``torch.linalg`` raise so often; gives the list of its calls: place, type and driver."""

    def fail(name: str, times: int, error: Exception = NOT_CONVERGED) -> list[tuple[str, torch.dtype, str | None]]:
        calls: list[tuple[str, torch.dtype, str | None]] = []
        original = getattr(torch.linalg, name)

        def called(own: Tensor, *, driver: str | None = None, **options: Any) -> Any:
            calls.append((own.device.type, own.dtype, driver))
            if len(calls) <= times:
                raise error
            return original(own.as_subclass(Tensor), **options)

        monkeypatch.setattr(torch.linalg, name, called)
        return calls

    return fail


def product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return u * s @ vh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5), (1, 4)])
def test_a_decomposition_that_converges_is_what_torch_gives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    own = matrix(*shape, dtype)
    with drivers.fallbacks() as told:
        for found, expected in zip(drivers.svd(own), torch.linalg.svd(own, full_matrices=False), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(drivers.qr(own), torch.linalg.qr(own), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(drivers.svdvals(own), torch.linalg.svdvals(own))
        square = own @ own.T
        for found, expected in zip(drivers.eigh(square), torch.linalg.eigh(square), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(drivers.eigvalsh(square), torch.linalg.eigvalsh(square))
    assert told == []


@pytest.mark.parametrize("error", [NOT_CONVERGED, CUSOLVER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_on_the_cpu_the_transpose_in_float64_comes_next(failing, shape, dtype, error) -> None:
    own, expected = matrix(*shape, dtype), drivers.svd(matrix(*shape, dtype))
    calls = failing("svd", 1, error)
    with drivers.fallbacks() as told:
        u, s, vh = drivers.svd(own)
    assert [call[:2] for call in calls] == [("cpu", dtype), ("cpu", torch.float64)]
    assert {u.dtype, s.dtype, vh.dtype} == {dtype}
    torch.testing.assert_close(s, expected[1])
    left, right = fix_signs(u, vh)
    torch.testing.assert_close((left, right), fix_signs(expected[0], expected[2]))
    name = str(dtype).removeprefix("torch.")
    what = f"the singular value decomposition of a {shape[0]} × {shape[1]} {name} matrix"
    assert told == [f"{what} failed on cpu; made in float64 on the CPU"]


@pytest.mark.parametrize(
    ("failures", "expected", "how"),
    [
        (0, [("cuda", None)], None),
        (1, [("cuda", None), ("cuda", "gesvd")], "with the driver gesvd"),
        (2, [("cuda", None), ("cuda", "gesvd"), ("cpu", None)], "on the CPU"),
        (3, [("cuda", None), ("cuda", "gesvd"), ("cpu", None), ("cpu", None)], "in float64 on the CPU"),
    ],
)
@pytest.mark.parametrize("name", ["svd", "svdvals"])
def test_on_cuda_another_driver_comes_before_the_cpu(failing, name, failures, expected, how) -> None:
    calls = failing(name, failures)
    with drivers.fallbacks() as told:
        found = getattr(drivers, name)(matrix().as_subclass(OnCuda))
    values = found if name == "svdvals" else found[1]
    torch.testing.assert_close(values.as_subclass(Tensor), torch.linalg.svdvals(matrix()))
    assert [(place, driver) for place, _, driver in calls[: failures + 1]] == expected
    assert [sentence.split("made ")[1] for sentence in told] == ([how] if how else [])


@pytest.mark.parametrize("name", ["eigh", "eigvalsh", "qr"])
def test_other_decompositions_go_from_the_gpu_to_the_cpu_and_then_to_float64(failing, name) -> None:
    expected = getattr(drivers, name)(symmetric())
    calls = failing(name, 2)
    with drivers.fallbacks() as told:
        result = getattr(drivers, name)(symmetric().as_subclass(OnCuda))
    found = [tensor.as_subclass(Tensor) for tensor in ([result] if name == "eigvalsh" else result)]
    assert calls == [("cuda", torch.float32, None), ("cpu", torch.float32, None), ("cpu", torch.float64, None)]
    assert len(told) == 1
    if name == "eigvalsh":
        torch.testing.assert_close(found[0], expected)
    elif name == "eigh":
        torch.testing.assert_close(found[1] * found[0] @ found[1].T, symmetric())
    else:
        torch.testing.assert_close(found[0] @ found[1], symmetric())


@pytest.mark.parametrize("name", ["eigh", "eigvalsh"])
def test_the_upper_triangle_is_never_read(failing, name) -> None:
    expected = torch.linalg.eigvalsh(symmetric())
    failing(name, 1)
    found = getattr(drivers, name)(symmetric().tril() + torch.full((6, 6), 1e3).triu(1))
    torch.testing.assert_close(found if name == "eigvalsh" else found[0], expected)


def test_a_matrix_that_is_not_finite_is_an_error_that_says_so() -> None:
    own = matrix()
    own[3, 2] = torch.nan
    message = (
        "the singular value decomposition of a 9 × 6 float32 matrix failed on cpu, and in float64 on the CPU. "
        "It holds values that are not finite: products of the inputs overflow; set dtype: float64"
    )
    with pytest.raises(StrategyError, match=message):
        drivers.svd(own)


@pytest.mark.parametrize("name", ["svd", "svdvals", "eigh", "eigvalsh", "qr"])
def test_a_finite_matrix_that_nothing_decomposes_is_an_error(failing, name) -> None:
    failing(name, 9)
    message = "failed on cpu, and in float64 on the CPU. Its entries are finite; merge this module in another space"
    with pytest.raises(StrategyError, match=message):
        getattr(drivers, name)(symmetric())


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("svd: expected a matrix"), ValueError("driver")])
def test_other_errors_are_raised_as_they_are(failing, error) -> None:
    calls = failing("svd", 1, error)
    with pytest.raises(type(error), match=str(error)):
        drivers.svd(matrix().as_subclass(OnCuda))
    assert len(calls) == 1


def test_a_sentence_is_told_once(failing) -> None:
    with drivers.fallbacks() as told:
        for _ in range(3):
            failing("svd", 1)
            drivers.svd(matrix())
    assert len(told) == 1


def test_only_the_innermost_listener_hears_it(failing) -> None:
    with drivers.fallbacks() as outer:
        with drivers.fallbacks() as inner:
            failing("svd", 1)
            drivers.svd(matrix())
        assert (len(outer), len(inner)) == (0, 1)
        failing("svd", 1)
        drivers.svd(matrix())
    assert len(outer) == 1


def test_nobody_has_to_listen(failing) -> None:
    failing("svd", 1)
    torch.testing.assert_close(product(*drivers.svd(matrix())), matrix())


def test_threads_hear_of_their_own_decompositions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.svd

    def called(own: Tensor, **options: Any) -> Any:
        if own.dtype == torch.float32 and own.shape[0] % 2:
            raise NOT_CONVERGED
        return original(own, **options)

    monkeypatch.setattr(torch.linalg, "svd", called)

    def decompose(n: int) -> list[str]:
        with drivers.fallbacks() as told:
            for _ in range(5):
                drivers.svd(matrix(10 + n, 4))
            return list(told)

    found = on_every_thread(4, decompose)
    assert [len(told) for told in found] == [0, 1, 0, 1]
    assert "a 13 × 4 float32 matrix" in found[3][0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_other_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.svd

    def called(own: Tensor, *, driver: str | None = None, **options: Any) -> Any:
        if driver is None:
            raise NOT_CONVERGED
        return original(own, driver=driver, **options)

    monkeypatch.setattr(torch.linalg, "svd", called)
    own = matrix(600, 400).cuda()
    with drivers.fallbacks() as told:
        u, s, vh = drivers.svd(own)
    assert u.device == own.device
    torch.testing.assert_close(product(u, s, vh), own, rtol=1e-4, atol=1e-4)
    assert "with the driver gesvd" in told[0]
