"""Merges on a real Ray cluster of two machines with a process each, some killed in the middle of their work."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faulty
import mergekit_lowrank_ray
import pytest
import torch
from mergekit_lowrank_ray.executor import RayExecutor
from safetensors.torch import load_file, save_file

from mergekit_lowrank import (
    Adapter,
    InterruptedMergeError,
    MergeError,
    Registry,
    StrategyError,
    merge,
)
from mergekit_lowrank.executors import Job
from mergekit_lowrank.testing import write_tiny_adapter

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [
    pytest.mark.slow,
    # Some versions of Ray leave log files and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*(/session_|Popen.__del__).*:pytest.PytestUnraisableExceptionWarning"),
]

MODULES = {f"layers.{layer}.{name}": (12, 10) for layer in range(3) for name in ("q", "v")}
NODE = {"num_cpus": 1, "memory": 10**9, "object_store_memory": 80 * 2**20}
SECONDS = 120


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``faulty`` leaves them."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def cluster(notes: Path) -> Iterator[object]:
    """Two machines, as Ray sees them, with a worker process each; the second says that it has a GPU."""
    here, plugins = Path(__file__), Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parent, plugins, plugins.parents[1]))))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv(faulty.DIRECTORY, str(notes))
        made = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.with_gpu = made.add_node(**NODE, num_gpus=1)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def connected(cluster) -> None:
    """A program that uses the cluster already, so that workers are kept from one test to the next."""
    if not ray.is_initialized():
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that uses no cluster."""
    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def registry(notes: Path) -> Registry:
    for note in notes.iterdir():
        note.unlink()
    made = Registry()
    made.register(mergekit_lowrank_ray, "ray")
    made.register(faulty.Plugin(), "faulty")
    return made


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, object]]:
    paths = [write_tiny_adapter(tmp_path / f"in{seed}", MODULES, rank=3, seed=seed) for seed in range(3)]
    return [{"model": str(path)} for path in paths]


def files(directory: Path) -> dict[str, bytes]:
    times = ("report.html", "timings.json")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in times}


def same_on_ray(recipe: dict[str, object], tmp_path: Path, registry: Registry) -> None:
    merge(recipe, tmp_path / "serial", registry=registry, executor="serial")
    merge(recipe, tmp_path / "ray", registry=registry, executor="ray")
    assert files(tmp_path / "ray") == files(tmp_path / "serial")


def replaced(path: Path, old: str, new: str) -> bytes:
    return path.read_bytes().replace(old.encode(), new.encode())


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("connected")
class TestOnACluster:
    @pytest.mark.exhaustive
    def test_a_survey_and_ranks_from_the_data(self, tmp_path: Path, registry: Registry, models) -> None:
        parameters = {"scope": "model", "density": 0.4}
        recipe = {"merge_method": "ties", "models": models, "parameters": parameters}
        same_on_ray({**recipe, "output": {"rank": {"energy": 0.9}}}, tmp_path, registry)

    def test_a_fold_into_a_model_of_several_files(self, tmp_path: Path, registry: Registry) -> None:
        base = tmp_path / "base"
        base.mkdir()
        generator = torch.Generator().manual_seed(0)
        names = [f"layers.{layer}.{name}.weight" for layer in range(3) for name in ("q", "v", "norm")]
        shapes = {name: (12,) if "norm" in name else (12, 10) for name in names}
        save_file(
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
            base / "model.safetensors",
        )
        (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
        paths = [write_tiny_adapter(tmp_path / f"in{seed}", MODULES, seed=seed) for seed in range(2)]
        recipe = {"merge_method": "linear", "models": [{"model": str(p)} for p in paths], "base_model": str(base)}
        same_on_ray({**recipe, "output": {"kind": "model", "shard_size": "1500B"}}, tmp_path, registry)
        assert len(list((tmp_path / "ray").glob("model-*.safetensors"))) > 2

    def test_adapters_in_memory(self, registry: Registry, models) -> None:
        opened = []
        for model in models:
            path = Path(str(model["model"]))
            config = json.loads((path / "adapter_config.json").read_text())
            opened.append({"model": Adapter(load_file(path / "adapter_model.safetensors"), config)})
        recipe = {"merge_method": "linear", "models": opened}
        serial, on_ray = (merge(recipe, registry=registry, executor=name) for name in ("serial", "ray"))
        assert serial.state_dict.keys() == on_ray.state_dict.keys()
        assert all(torch.equal(serial.state_dict[name], on_ray.state_dict[name]) for name in serial.state_dict)

    def test_paths_that_start_from_the_working_directory(
        self, tmp_path: Path, registry: Registry, models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        relative = [{"model": Path(str(model["model"])).name} for model in models]
        same_on_ray({"merge_method": "linear", "models": relative}, tmp_path, registry)

    def test_a_worker_that_is_killed_is_made_up_for(
        self, tmp_path: Path, registry: Registry, notes: Path, models
    ) -> None:
        merge({"merge_method": "calm", "models": models}, tmp_path / "calm", registry=registry)
        merge({"merge_method": "dying", "models": models}, tmp_path / "dying", registry=registry, executor="ray")
        assert (notes / "died").exists()
        assert same_tensors(tmp_path / "dying", tmp_path / "calm")  # the header names the method
        report = tmp_path / "dying" / "report.json"
        assert replaced(report, "dying", "calm") == (tmp_path / "calm" / "report.json").read_bytes()

    def test_a_machine_that_is_lost_is_made_up_for(
        self, tmp_path: Path, registry: Registry, notes: Path, models, cluster
    ) -> None:
        merge({"merge_method": "calm", "models": models}, tmp_path / "calm", registry=registry)
        third = cluster.add_node(**NODE)
        lost = threading.Thread(target=lose, args=(cluster, third, notes))
        lost.start()
        merge({"merge_method": "waiting", "models": models}, tmp_path / "waiting", registry=registry, executor="ray")
        lost.join()
        assert (notes / f"at {third.node_id}").exists()
        assert same_tensors(tmp_path / "waiting", tmp_path / "calm")

    @pytest.mark.exhaustive
    def test_a_job_gets_a_gpu_where_it_needs_one(self, cluster) -> None:
        jobs = [Job(n, str(n), 1) for n in range(4)]
        found = list(RayExecutor().run(faulty.PlaceWithGpu(), jobs, memory_bytes=1))
        assert found == [(cluster.with_gpu.node_id, "0")] * 4

    def test_a_job_that_needs_more_memory_than_there_is_still_runs(self) -> None:
        ((_, gpus),) = RayExecutor(1).run(faulty.Place(), [Job(0, "", 10**15)], memory_bytes=1)
        assert not gpus

    def test_what_a_module_raises_is_raised_here(self, tmp_path: Path, registry: Registry, models) -> None:
        recipe = {"merge_method": "refusing", "models": models}
        with pytest.raises(
            StrategyError, match=r"'refusing' of plugin 'faulty' failed on module 'layers.1.q': ValueError"
        ):
            merge(recipe, tmp_path / "out", registry=registry, executor="ray")
        assert not list(tmp_path.glob("*out*"))

    @pytest.mark.exhaustive
    def test_a_module_that_kills_every_worker_interrupts_the_merge(
        self, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mergekit_lowrank_ray.executor.RETRIES", 1)
        path = write_tiny_adapter(tmp_path / "in", {"layers.0.q": (12, 10)})
        recipe = {"merge_method": "mortal", "models": [{"model": str(path)}]}
        with pytest.raises(InterruptedMergeError, match="Ray gave up a module"):
            merge(recipe, tmp_path / "out", registry=registry, executor="ray")
        assert not (tmp_path / "out").exists()


def lose(cluster, node, notes: Path) -> None:
    """Remove a machine once a module is being merged there; then let all modules go on."""
    until = time.monotonic() + SECONDS
    while not (notes / f"at {node.node_id}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    (notes / "go").touch()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("unconnected")
def test_the_cluster_of_ray_address(
    tmp_path: Path, registry: Registry, models, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    same_on_ray({"merge_method": "linear", "models": models}, tmp_path, registry)
    assert not ray.is_initialized()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("unconnected")
def test_without_a_cluster_one_is_started_and_ended(
    tmp_path: Path, registry: Registry, models, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, root = Path(__file__).parents[1], Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (plugin, root))))
    recipe = {"merge_method": "linear", "models": models, "execution": {"executor": "ray", "workers": 2}}
    before = signal.getsignal(signal.SIGTERM)
    merge(recipe, tmp_path / "ray", registry=registry)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not ray.is_initialized()
    merge(recipe, tmp_path / "serial", registry=registry, executor="serial")
    assert files(tmp_path / "ray") == files(tmp_path / "serial")


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "nonsense"])
def test_an_address_where_no_cluster_is_is_an_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MergeError, match=rf"RAY_ADDRESS={re.escape(address)}: there is no Ray cluster \("):
        next(iter(RayExecutor().run(faulty.Place(), [], memory_bytes=1)))
