"""Devices are chosen before any work, and what is not there is said; updates get there whole."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import pytest
import torch

from mergekit_lowrank import OutputError, RecipeError, StrategyError, merge
from mergekit_lowrank.engine.devices import CpuDevice, CudaDevice, Device, MpsDevice, select_devices
from mergekit_lowrank.lowrank import StreamedUpdate, densify, svd
from mergekit_lowrank.lowrank.decompositions import thin_qr
from mergekit_lowrank.lowrank.drivers import fallbacks
from mergekit_lowrank.spaces import Part
from mergekit_lowrank.spaces.base import BLOCK_ENTRIES, DEVICE_BLOCK_ENTRIES, device_blocks
from mergekit_lowrank.testing import random_update, random_updates
from tests.engine.fake_device import FakeDevice, FakeTensor, on_every_thread
from tests.engine.makers import adapters, recipe_of
from tests.strategies.methods import Subject, assert_close, each

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def names(devices: tuple[Device, ...]) -> list[str]:
    return [device.name for device in devices]


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert select_devices("auto")[0].torch.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_all_gpus_are_taken(three_gpus: None, name: str) -> None:
    assert names(select_devices(name)) == ["cuda:0", "cuda:1", "cuda:2"]


def test_one_gpu_can_be_chosen(three_gpus: None) -> None:
    assert names(select_devices("cuda:1")) == ["cuda:1"]


def test_the_cpu_can_be_chosen_beside_gpus(three_gpus: None) -> None:
    assert isinstance(select_devices("cpu")[0], CpuDevice)


def test_gpus_whose_driver_does_not_work_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert isinstance(select_devices("auto")[0], CpuDevice)


def test_mps_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert isinstance(select_devices("mps")[0], MpsDevice)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown device 'gpu'; expected auto, cpu, cuda, cuda:N or mps"):
        select_devices("gpu")


def test_a_device_that_is_not_supported_is_refused() -> None:
    with pytest.raises(RecipeError, match="device 'meta' is not supported"):
        select_devices("meta")


@pytest.mark.parametrize("name", ["cuda:99", "cuda:3"])
def test_a_device_that_is_not_there_is_refused(three_gpus: None, name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' was asked for, but this machine has 3 of its kind"):
        select_devices(name)


def test_devices_can_be_sent_to_another_process(three_gpus: None) -> None:
    for device in (*select_devices("cuda"), CpuDevice(), MpsDevice(torch.device("mps"))):
        sent = pickle.loads(pickle.dumps(device))
        assert (type(sent), sent.torch) == (type(device), device.torch)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    ],
)
def test_no_memory_is_told_by_many_messages_and_from_behind_other_errors(error: RuntimeError) -> None:
    device = CudaDevice(torch.device("cuda", 0))
    assert device.is_out_of_memory(error)
    blamed = StrategyError("strategy 'x' failed on module 'm'")
    blamed.__cause__ = error
    assert device.is_out_of_memory(blamed)
    assert not CpuDevice().is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), OutputError("the disk is out of memory"), KeyError("m")]
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not CudaDevice(torch.device("cuda", 0)).is_out_of_memory(error)


@pytest.mark.parametrize(("asked", "fraction"), [(2 << 30, 0.25), (8 << 30, 1.0), (64 << 30, 1.0)])
def test_the_limit_of_a_gpu_is_a_share_of_its_memory(monkeypatch, asked: int, fraction: float) -> None:
    found = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"total_memory": 8 << 30})
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: found.append(given))
    CudaDevice(torch.device("cuda", 1)).limit(asked)
    assert found == [(fraction, torch.device("cuda", 1))]


def test_the_limit_of_mps_is_a_share_of_what_it_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 << 30)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", found.append)
    MpsDevice(torch.device("mps")).limit(4 << 30)
    assert found == [0.25]


def test_an_old_torch_cannot_limit_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.mps, "recommended_max_memory")
    with pytest.raises(RecipeError, match="'vram' cannot be limited on mps by torch before"):
        MpsDevice(torch.device("mps")).limit(4 << 30)


def test_mps_has_no_float64() -> None:
    with pytest.raises(RecipeError, match="device 'mps' has no float64; set dtype: float32, or device: cpu"):
        MpsDevice(torch.device("mps")).upload([random_update(7, 9, 2)], torch.float64)


def test_the_cpu_takes_updates_as_they_are() -> None:
    updates = random_updates(7, 9, (2, 3))
    assert all(
        moved.b is own.b and moved.a is own.a
        for moved, own in zip(CpuDevice().upload(updates, torch.float32), updates, strict=True)
    )


def test_updates_are_sent_and_widened() -> None:
    device, update = FakeDevice(), random_update(7, 9, 2, scaling=0.5, dtype=torch.bfloat16)
    with device.active():
        (sent,) = device.upload([update], torch.float32)
    assert (sent.b.device, sent.b.dtype, sent.scaling) == (device.torch, torch.float32, 0.5)
    assert torch.equal(sent.b.cpu(), update.b.float())
    assert device.held_bytes == 4 * 2 * (7 + 9)


def test_rows_of_a_streamed_update_are_sent_as_they_are_read() -> None:
    device, delta = FakeDevice(), densify(random_update(64, 9, 2)).double()
    update = StreamedUpdate.of(delta).scaled(2.0)
    with device.active():
        sent = device.placed(update, torch.float32)
        assert (device.held_bytes, sent.device, sent.dtype, sent.shape) == (0, device.torch, torch.float32, (64, 9))
        for first in range(0, 64, 4):
            rows = sent.rows(slice(first, first + 4))
            assert rows.device == device.torch
            torch.testing.assert_close(rows.cpu(), 2 * delta[first : first + 4].float())
    assert device.peak_bytes == 2 * 4 * 4 * 9  # the rows before and these


def test_blocks_on_the_cpu_do_not_depend_on_those_of_a_gpu() -> None:
    part = Part.stacked("delta", torch.empty(1).expand(2, 4096, 4096), (1.0, 1.0))
    planned = part.slices()
    assert len(planned) == 2 * 4096 * 4096 // BLOCK_ENTRIES
    with device_blocks(64):
        assert part.slices() == planned


def test_blocks_on_a_gpu_are_as_small_as_asked_for() -> None:
    part = Part.stacked("delta", FakeTensor(torch.empty(1).expand(2, 8192, 4096), FakeDevice()), (1.0, 1.0))
    assert len(part.slices()) == 2 * 8192 * 4096 // DEVICE_BLOCK_ENTRIES
    with device_blocks(DEVICE_BLOCK_ENTRIES >> 3):
        assert len(part.slices()) == 8 * 2 * 8192 * 4096 // DEVICE_BLOCK_ENTRIES


@pytest.mark.parametrize(("shape", "stays"), [((4096, 32768), True), ((300, 200), True), ((128, 128), False)])
@pytest.mark.parametrize(("decompose", "operation"), [(svd, "aten::_linalg_svd"), (thin_qr, "aten::linalg_qr")])
def test_small_matrices_are_decomposed_on_the_cpu(decompose, operation, shape, stays) -> None:
    device = FakeDevice()
    device.fail(operation, KeyboardInterrupt)  # the large one would take minutes
    matrix = FakeTensor(torch.ones(1).expand(shape), device)
    with device.active(), pytest.raises(KeyboardInterrupt) if stays else nullcontext():
        assert all(found.device == device.torch for found in decompose(matrix))
    assert device.operations[operation] == int(stays)


def test_a_decomposition_that_fails_on_a_gpu_is_made_on_the_cpu() -> None:
    device, matrix = FakeDevice(), torch.randn(300, 20)
    device.fail("aten::_linalg_svd", torch.linalg.LinAlgError)
    with device.active(), fallbacks() as told:
        u, s, vh = svd(device.sent_here(matrix))
    assert u.device == device.torch
    torch.testing.assert_close((u * s @ vh).cpu(), matrix)
    assert told == ["the singular value decomposition of a 300 × 20 float32 matrix failed on lazy:0; made on the CPU"]


def test_a_gpu_refuses_what_is_elsewhere() -> None:
    device, other = FakeDevice(0), FakeDevice(1)
    with pytest.raises(RuntimeError, match="expected all tensors on lazy:0, found lazy:0, cpu"):
        device.sent_here(torch.ones(3)) + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors on lazy:0, found lazy:0, lazy:1"):
        device.sent_here(torch.ones(3)) + other.sent_here(torch.ones(3))


def test_a_gpu_counts_what_its_tensors_hold() -> None:
    device = FakeDevice(capacity_bytes=4 * 10)
    own = device.sent_here(torch.ones(6))
    view = own[2:4]
    assert device.held_bytes == 24
    with pytest.raises(torch.cuda.OutOfMemoryError, match="24 bytes were asked for"):
        own + own
    del own
    assert device.held_bytes == 24
    del view
    assert (device.held_bytes, device.peak_bytes) == (0, 24)


def test_a_gpu_counts_right_under_many_threads() -> None:
    device = FakeDevice()

    def work(n: int) -> float:
        with device.active():
            own = torch.arange(100 + n, device=device.torch)
            return float(sum((own * k).sum() for k in range(20)))

    assert on_every_thread(8, work) == [190 * sum(range(100 + n)) for n in range(8)]
    assert device.held_bytes == 0


@each()
def test_every_method_runs_where_its_inputs_are(subject: Subject) -> None:
    device = FakeDevice()
    updates = random_updates(14, 19, subject.counted((2, 3, 1)), 1)
    with device.active():
        merged = subject.update(device.upload(updates, torch.float32))
        assert merged.device == device.torch
        found = densify(merged).cpu()
    assert_close(found, subject.merged(updates), 1e-4)


@each(lambda subject: subject.preset.takes_dense and subject.space_kind.takes_dense)
def test_every_method_that_takes_dense_inputs_runs_where_they_are(subject: Subject) -> None:
    device = FakeDevice()
    updates = [StreamedUpdate.of(densify(u)) for u in random_updates(14, 19, subject.counted((2, 3, 1)), 1)]
    with device.active():
        merged = subject.update(device.upload(updates, torch.float32))
        assert merged.device == device.torch
        found = densify(merged).cpu()
    assert_close(found, subject.merged(updates), 1e-4)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_updates_reach_a_gpu_whole(dtype: torch.dtype) -> None:
    updates = random_updates(4096, 1000, (16, 64, 16), 1, dtype=dtype)
    device = select_devices("cuda")[0]
    device.prepare()
    for _ in range(20):
        sent = device.upload(updates, torch.float32)
        sums = [update.b.sum() + update.a.sum() for update in sent]  # read while others are still on their way
        for update, there, total in zip(updates, sent, sums, strict=True):
            assert torch.equal(there.b.cpu(), update.b.float())
            assert torch.equal(there.a.cpu(), update.a.float())
            assert float(total) == pytest.approx(float(update.b.float().sum() + update.a.float().sum()), abs=1e-2)


@pytest.mark.cuda
@needs_cuda
def test_rows_reach_a_gpu_whole() -> None:
    delta = torch.randn(4096, 1000)
    device = select_devices("cuda")[0]
    sent = device.placed(StreamedUpdate.of(delta), torch.float32)
    rows = [sent.rows(slice(first, first + 64)) for first in range(0, 4096, 64)]
    assert torch.equal(torch.cat(rows).cpu(), delta)


@pytest.mark.cuda
@needs_cuda
def test_the_limit_of_a_gpu_holds() -> None:
    device = select_devices("cuda")[0]
    device.prepare()
    try:
        device.limit(256 << 20)
        with pytest.raises(RuntimeError) as error:
            torch.empty(257 << 20, dtype=torch.uint8, device=device.torch)
        assert device.is_out_of_memory(error.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.torch)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("method", ["linear", "ties", "robustmerge", "drm", "knots", "core_ties"])
def test_a_gpu_gives_the_values_of_the_cpu(tmp_path, method) -> None:
    paths = adapters(tmp_path, 3)
    on_cpu = merge(recipe_of(paths, method, output={"rank": "sum"}), device="cpu").state_dict
    on_gpu = merge(recipe_of(paths, method, output={"rank": "sum"}), device="cuda").state_dict
    for name in on_cpu:
        if name.endswith("lora_B.weight"):
            a = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(
                on_gpu[name] @ on_gpu[a],
                on_cpu[name] @ on_cpu[a],
                rtol=1e-3,
                atol=1e-4 * on_cpu[name].abs().max().item(),
            )
