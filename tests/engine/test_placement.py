"""Modules take devices in turn within their memory; one that does not fit gets smaller blocks, then the CPU."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import StrategyError, merge
from mergekit_lowrank.engine import placement
from mergekit_lowrank.engine.devices import CpuDevice, Device, select_devices
from mergekit_lowrank.engine.placement import HALVINGS, DevicePool, attempt
from mergekit_lowrank.lowrank import StreamedUpdate, densify, svd
from mergekit_lowrank.spaces import DeltaSpace, SpaceParams
from mergekit_lowrank.spaces.base import block_entries, device_blocks
from mergekit_lowrank.strategies import Ties
from mergekit_lowrank.testing import random_updates
from mergekit_lowrank.testing.driver import merge_updates
from tests.engine.fake_device import FakeDevice, on_every_thread
from tests.engine.makers import MODULES, adapters, recipe_of

NoMemory = torch.cuda.OutOfMemoryError
NotConverged = torch.linalg.LinAlgError
BLOCK = 1 << 12
"""In place of ``DEVICE_BLOCK_ENTRIES``, which tests would not fill."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "DEVICE_BLOCK_ENTRIES", BLOCK)


def gpus(count: int, capacity_bytes: int | None = None) -> list[FakeDevice]:
    return [FakeDevice(n, capacity_bytes) for n in range(count)]


def failing(times: int, error: type[BaseException] = NoMemory, tried: list[tuple[str, int]] | None = None):
    """Work that fails on a GPU so often; it gives the device and its block size."""
    made = tried if tried is not None else []

    def work(device: Device) -> tuple[str, int]:
        made.append((device.name, block_entries(device.torch)))
        if len(made) <= times and device.torch.type != "cpu":
            raise error("on demand")
        return made[-1]

    return work


def ties(updates, device: Device):
    """A merge in blocks, its result on the CPU."""
    sent = device.upload(updates, torch.float32)
    merged = merge_updates(Ties(Ties.Params(density=1.0)), DeltaSpace(SpaceParams()), sent)
    return densify(merged).cpu()


def test_modules_take_devices_in_turn() -> None:
    pool = DevicePool(gpus(3))
    with pool.device_for(10) as first, pool.device_for(10) as second, pool.device_for(10) as third:
        assert [first.name, second.name, third.name] == ["lazy:0", "lazy:1", "lazy:2"]
        with pool.device_for(10) as again:
            assert again is first
    with pool.device_for(10) as later:
        assert later is first


def test_the_device_with_the_least_promised_bytes_is_taken() -> None:
    pool = DevicePool(gpus(2))
    with pool.device_for(100) as first, pool.device_for(10) as second, pool.device_for(10) as third:
        assert first is not second
        assert third is second


def test_a_device_is_given_back_after_an_error() -> None:
    pool = DevicePool(gpus(2))
    with pytest.raises(KeyError), pool.device_for(10):
        raise KeyError
    with pool.device_for(10) as device:
        assert device.name == "lazy:0"


def test_devices_are_made_ready_once_and_limited() -> None:
    devices = gpus(2, capacity_bytes=100)
    pool = DevicePool(devices, vram_bytes=60)
    assert [device.prepared for device in devices] == [0, 0]
    on_every_thread(4, lambda n: attempt(pool, failing(0), need_bytes=n))
    assert [device.prepared for device in devices] == [1, 1]
    assert [device.capacity_bytes for device in devices] == [60, 60]


def test_a_pool_starts_anew_in_another_process() -> None:
    pool = DevicePool([CpuDevice()], vram_bytes=60)
    with pool.device_for(10):
        sent = pickle.loads(pickle.dumps(pool))
    assert (sent.devices[0].name, sent.vram_bytes) == ("cpu", 60)
    with sent.device_for(10) as device:
        assert device.name == "cpu"


@pytest.mark.parametrize(("capacity", "vram"), [(100, None), (100, 1000), (1000, 100)])
def test_modules_wait_until_there_is_room(capacity: int, vram: int | None) -> None:
    pool = DevicePool(gpus(1, capacity), vram)
    entered, lock = [0, 0], threading.Lock()
    together = threading.Barrier(2, timeout=10)

    def module(n: int) -> None:
        with pool.device_for(50):
            with lock:
                entered[0] += 1
                entered[1] = max(entered)
            together.wait()  # two fit at once, or this breaks
            with lock:
                entered[0] -= 1

    assert on_every_thread(8, module) == [None] * 8
    assert entered == [0, 2]


def test_a_module_that_is_too_large_runs_alone() -> None:
    pool = DevicePool(gpus(1, 100))
    waiting = threading.Event()
    order = []

    def small() -> None:
        waiting.set()
        with pool.device_for(1):
            order.append("small")

    thread = threading.Thread(target=small)
    with pool.device_for(1000):
        thread.start()
        assert waiting.wait(10)
        order.append("large")
    thread.join()
    assert order == ["large", "small"]


@pytest.mark.parametrize(("workers", "shares"), [(1, [60]), (2, [60, 60]), (3, [30, 60, 30]), (4, [30, 30, 30, 30])])
def test_processes_share_the_devices_and_their_limits(workers: int, shares: list[int]) -> None:
    pool = DevicePool(gpus(2), vram_bytes=60)
    own = [pool.of_worker(worker, workers) for worker in range(workers)]
    assert [[device.name for device in one.devices] for one in own] == [[f"lazy:{n % 2}"] for n in range(workers)]
    assert [one.vram_bytes for one in own] == shares


def test_the_cpu_takes_as_many_modules_as_come() -> None:
    pool = DevicePool([CpuDevice()], vram_bytes=1)
    with pool.device_for(100), pool.device_for(100) as device:
        assert device.name == "cpu"


def test_work_that_fits_has_nothing_to_tell() -> None:
    assert attempt(DevicePool(gpus(1)), failing(0)) == (("lazy:0", BLOCK), ())


@pytest.mark.parametrize("times", range(1, HALVINGS + 1))
def test_blocks_are_halved_until_the_module_fits(times: int) -> None:
    device = FakeDevice()
    found, told = attempt(DevicePool([device]), failing(times))
    assert found == ("lazy:0", BLOCK >> times)
    assert told == (f"lazy:0 ran out of memory: merged in blocks of {BLOCK >> times} entries in place of {BLOCK}",)
    assert device.recoveries == [0] * times


def test_a_module_that_never_fits_is_merged_on_the_cpu() -> None:
    tried: list[tuple[str, int]] = []
    found, told = attempt(DevicePool(gpus(1)), failing(99, tried=tried))
    assert [entries for _, entries in tried[:-1]] == [BLOCK >> k for k in range(HALVINGS + 1)]
    assert found[0] == "cpu"
    assert told == (f"lazy:0 ran out of memory, even in blocks of {BLOCK >> HALVINGS} entries: merged on the CPU",)


def test_blocks_are_as_before_afterwards() -> None:
    device = FakeDevice()
    before = block_entries(device.torch)
    attempt(DevicePool([device]), failing(2))
    assert block_entries(device.torch) == before


def test_a_device_without_memory_is_seen_behind_the_error_that_names_the_module() -> None:
    def work(device: Device) -> str:
        if device.torch.type != "cpu" and block_entries(device.torch) == BLOCK:
            try:
                raise NoMemory
            except RuntimeError as error:
                raise StrategyError("strategy 'x' of plugin 'y' failed on module 'm'") from error
        return device.name

    found, told = attempt(DevicePool(gpus(1)), work)
    assert (found, len(told)) == ("lazy:0", 1)


@pytest.mark.parametrize("error", [StrategyError, RuntimeError, KeyboardInterrupt])
def test_other_errors_are_raised_and_the_device_given_back(error: type[BaseException]) -> None:
    pool = DevicePool(gpus(1, 100))
    with pytest.raises(error):
        attempt(pool, failing(1, error), need_bytes=100)
    assert attempt(pool, failing(0), need_bytes=100)[1] == ()


def test_a_processor_without_memory_is_an_error() -> None:
    def work(device: Device) -> None:
        raise NoMemory

    with pytest.raises(torch.cuda.OutOfMemoryError):
        attempt(DevicePool([CpuDevice()]), work)


def test_memory_is_free_before_the_next_attempt() -> None:
    device = FakeDevice(capacity_bytes=4000)
    free = []

    def work(device: FakeDevice) -> int:
        if device.torch.type == "cpu":
            return 0
        free.append(device.free_bytes())
        kept = [torch.zeros(100, device=device.torch) for _ in range(9)]
        return len([torch.zeros(block_entries(device.torch) // 16, device=device.torch), *kept])

    found, told = attempt(DevicePool([device]), work)
    assert found == 10
    assert "blocks of 1024 entries" in told[0]
    assert set(free) == {4000}
    assert device.recoveries == [0, 0]


def test_decompositions_that_fell_back_are_told() -> None:
    device = FakeDevice()
    device.fail("aten::_linalg_svd", NotConverged)
    _, told = attempt(DevicePool([device]), lambda d: svd(d.sent_here(torch.randn(300, 20)))[1].cpu())
    assert told == ("the singular value decomposition of a 300 × 20 float32 matrix failed on lazy:0; made on the CPU",)


def test_what_an_attempt_that_was_given_up_fell_back_to_is_not_told() -> None:
    device = FakeDevice()
    device.fail("aten::_linalg_svd", NotConverged)
    first = failing(1)

    def work(d: FakeDevice) -> None:
        svd(d.sent_here(torch.randn(300, 20)))
        first(d)

    _, told = attempt(DevicePool([device]), work)
    assert len(told) == 1
    assert told[0].startswith("lazy:0 ran out of memory")


def peak_bytes(updates, entries: int) -> int:
    device = FakeDevice()
    with device.active(), device_blocks(entries):
        ties(updates, device)
    return device.peak_bytes


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("halvings", range(HALVINGS + 1))
def test_a_merge_that_runs_out_of_memory_gives_the_same_in_smaller_blocks(halvings: int, dense: bool) -> None:
    updates = random_updates(40, 50, (3, 2, 4), 1)
    if dense:
        updates = [StreamedUpdate.of(densify(update)) for update in updates]
    device = FakeDevice(capacity_bytes=peak_bytes(updates, BLOCK >> halvings))
    found, told = attempt(DevicePool([device]), lambda d: ties(updates, d))
    assert device.peak_bytes <= device.capacity_bytes
    assert device.recoveries == [0] * halvings
    assert len(told) == min(halvings, 1)
    torch.testing.assert_close(found, ties(updates, CpuDevice()))


def test_a_merge_that_moves_to_the_cpu_gives_what_the_cpu_gives() -> None:
    updates = random_updates(40, 50, (3, 2, 4), 1)
    found, told = attempt(DevicePool([FakeDevice(capacity_bytes=1000)]), lambda d: ties(updates, d))
    assert torch.equal(found, ties(updates, CpuDevice()))
    assert "merged on the CPU" in told[0]


def test_everything_may_fail_at_once_from_many_threads() -> None:
    updates = random_updates(40, 50, (3, 2, 4), 1)
    expected = ties(updates, CpuDevice())
    room = peak_bytes(updates, BLOCK >> 2)
    first, second = FakeDevice(0, room), FakeDevice(1, 3 * room)
    first.fail("aten::empty", NoMemory, 2)
    second.fail("aten::bmm", NoMemory)
    second.fail("aten::_linalg_svd", NotConverged, 1000)
    pool = DevicePool([first, second])

    def work(device: Device):
        u, s, vh = svd(device.sent(torch.eye(257, 4), torch.float32))
        assert torch.equal((u * s @ vh).cpu(), torch.eye(257, 4))
        return ties(updates, device)

    def merges(n: int):
        return [attempt(pool, work, need_bytes=room) for _ in range(2)]

    done = [found for own in on_every_thread(4, merges) for found in own]
    for result, _ in done:
        torch.testing.assert_close(result, expected)
    told = [sentence for _, sentences in done for sentence in sentences]
    assert any("blocks of" in sentence and "lazy:0" in sentence for sentence in told)
    assert any("failed on lazy:1; made on the CPU" in sentence for sentence in told)
    assert [device.held_bytes for device in (first, second)] == [0, 0]
    assert all(device.peak_bytes <= device.capacity_bytes for device in (first, second))
    assert not any(first.recoveries)


@pytest.fixture
def merge_on(monkeypatch: pytest.MonkeyPatch):
    """A whole merge on these devices."""

    def merged(devices: list[FakeDevice], *given, **options):
        with monkeypatch.context() as patched:
            patched.setattr("mergekit_lowrank.api.select_devices", lambda _: tuple(devices))
            return merge(*given, **options)

    return merged


def told_by(report) -> set[str]:
    return {sentence for module in report.modules for sentence in module["warnings"]}


@pytest.mark.parametrize(
    ("method", "capacity"),
    [
        *((method, None) for method in ("linear", "ties", "robustmerge", "drm", "core_ties", "dare_ties")),
        *((method, 4000) for method in ("ties", "drm")),
    ],
)
def test_a_recipe_is_merged_on_several_gpus(tmp_path, merge_on, method: str, capacity: int | None) -> None:
    recipe = recipe_of(adapters(tmp_path, 3), method, output={"rank": "sum"})
    devices = gpus(2, capacity)
    expected, found = merge(recipe, device="cpu").state_dict, merge_on(devices, recipe)
    for name in expected:
        if name.endswith("lora_B.weight"):
            a = name.replace("lora_B", "lora_A")
            on_gpu, on_cpu = found.state_dict[name] @ found.state_dict[a], expected[name] @ expected[a]
            torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
    assert devices[0].peak_bytes
    assert not any(device.held_bytes for device in devices)
    moved = any("merged on the CPU" in sentence for sentence in told_by(found.report))
    assert moved == (capacity is not None)


@pytest.mark.parametrize(("method", "capacity"), [("linear", None), ("ties", None), ("drm", None), ("ties", 4000)])
def test_fine_tunes_are_folded_on_several_gpus(tmp_path, merge_on, method: str, capacity: int | None) -> None:
    base = save_model(tmp_path / "base", 0)
    models = [str(save_model(tmp_path / f"tuned{n}", n)) for n in (1, 2, 3)]
    recipe = recipe_of(models, method, base_model=str(base), output={"kind": "model"})
    devices = gpus(2, capacity)
    merge(recipe, tmp_path / "cpu", device="cpu")
    report = merge_on(devices, recipe, tmp_path / "gpu")
    expected, found = (load_file(tmp_path / place / "model.safetensors") for place in ("cpu", "gpu"))
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert devices[0].peak_bytes
    assert not any(device.held_bytes for device in devices)
    assert bool(told_by(report)) == (capacity is not None)


def save_model(directory: Path, seed: int) -> Path:
    """A model of the makers' modules, a norm and an embedding; others than the first are near it."""
    source = torch.Generator().manual_seed(seed)
    shapes = {f"{name}.weight": shape for name, shape in MODULES.items()}
    shapes |= {"model.norm.weight": (10,), "model.embed_tokens.weight": (20, 10)}
    tensors = {name: torch.ones(shape) + 0.1 * torch.randn(shape, generator=source) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory_leaves_it_to_the_cpu() -> None:
    updates = random_updates(4096, 4096, (16, 16, 16), 1)
    device = select_devices("cuda")[0]
    try:
        found, told = attempt(DevicePool([device], vram_bytes=32 << 20), lambda d: ties(updates, d))
        assert torch.equal(found, ties(updates, CpuDevice()))
        assert "merged on the CPU" in told[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.torch)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_gpus_merge_at_once() -> None:
    updates = random_updates(1024, 1024, (16, 16, 16), 1)
    expected = ties(updates, CpuDevice())
    pool = DevicePool(select_devices("cuda"))
    for found, told in on_every_thread(8, lambda n: attempt(pool, lambda d: ties(updates, d), need_bytes=1 << 30)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert told == ()


def test_a_process_gets_one_device_and_its_share_of_the_memory_there() -> None:
    devices = gpus(3)
    pool = DevicePool(devices, vram_bytes=60)
    found = [pool.of_worker(worker, 8) for worker in range(8)]
    assert [own.devices for own in found] == [(devices[n % 3],) for n in range(8)]
    assert [own.vram_bytes for own in found] == [20, 20, 30, 20, 20, 30, 20, 20]
    assert DevicePool(devices).of_worker(4, 5).vram_bytes is None
