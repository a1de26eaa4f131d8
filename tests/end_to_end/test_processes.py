"""What only whole processes show: the same bytes whatever the environment, and memory that keeps to its budget."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_lowrank import MemoryBudgetError, plan
from mergekit_lowrank.testing import write_tiny_adapter
from tests.benchmarks.scale.models import Llama, write_base, write_fine_tune
from tests.benchmarks.scale.peaks import in_interpreter
from tests.benchmarks.shapes import write_set

MERGE = """
import json, sys
from mergekit_lowrank import merge
recipe, out, executor = json.loads(sys.argv[1])
merge(recipe, out, executor=executor)
"""

MEMORY = """
import json, sys, threading
import torch
from mergekit_lowrank import merge

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

warm, recipe, out = json.loads(sys.argv[1])
merge(warm)
before, peak, stop = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
merge(recipe, out)
stop.set()
watcher.join()
print(peak - before)
"""


# The C library then returns every freed tensor at once, so that what is held shows, and nothing else.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}


def run(script: str, argument, **environment) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def cases(table, *exhaustive):
    """The names of cases; those that need not be looked at each time are marked."""
    assert set(exhaustive) <= set(table)
    return [pytest.param(name, marks=pytest.mark.exhaustive if name in exhaustive else ()) for name in table]


def recipe_of(paths, method, **keys):
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


@pytest.mark.parametrize("method", ["ties", "robustmerge", "drm"])
def test_threads_hash_seed_and_executor_do_not_change_a_byte(tmp_path, method) -> None:
    modules = {f"layers.{layer}.{name}": (96, 64) for layer in range(3) for name in ("q", "v")}
    paths = [write_tiny_adapter(tmp_path / f"in{seed}", modules, rank=8, seed=seed) for seed in range(3)]
    digests = set()
    for i, (threads, hash_seed, executor) in enumerate([("1", "0", "serial"), ("4", "7", "threads")]):
        out = tmp_path / f"out{i}"
        recipe = recipe_of(paths, method, scale="auto")
        run(
            MERGE,
            (recipe, str(out), executor),
            OMP_NUM_THREADS=threads,
            MKL_NUM_THREADS=threads,
            PYTHONHASHSEED=hash_seed,
        )
        digests.add(hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", cases(["linear", "robustmerge", "drm"], "linear", "drm"))
def test_peak_memory_does_not_grow_with_the_number_of_modules(tmp_path, method) -> None:
    peaks = {}
    for layers in (4, 48):
        modules = {f"layers.{layer}.q": (1024, 1024) for layer in range(layers)}
        root = tmp_path / str(layers)
        paths = [write_tiny_adapter(root / f"in{seed}", modules, rank=16, seed=seed) for seed in range(4)]
        warm = recipe_of([write_tiny_adapter(root / "warm", {"layers.0.q": (64, 64)}, rank=4)] * 2, method)
        peaks[layers] = int(run(MEMORY, (warm, recipe_of(paths, method), str(root / "out")), **RETURNING))
    # The inputs of the large merge alone are 25 MB: a merge that kept them would show.
    assert peaks[48] < peaks[4] + 12e6


BOUNDED = {
    "linear with one large rank": ("linear", (2048, 2048), (15, 15, 128), {}),
    "linear, canonical and balanced": (
        "linear",
        (2048, 2048),
        (64,) * 4,
        {"canonical": "svd", "output": {"balance": True}},
    ),
    "ties": ("ties", (1536, 1536), (16,) * 8, {}),
    "ties to an energy": ("ties", (1024, 1024), (16,) * 4, {"output": {"rank": {"energy": 0.99}}}),
    "ties to a budget": (
        "ties",
        (1024, 1024),
        (16,) * 4,
        {"output": {"rank": {"budget": "1MB"}, "uniform_rank": False}},
    ),
    "drm": ("drm", (4096, 1024), (16,) * 8, {}),
    "core_ties": ("core_ties", (4096, 1024), (16,) * 8, {}),
    "robustmerge": ("robustmerge", (4096, 2048), (16,) * 8, {}),
    "robustmerge, canonical": ("robustmerge", (4096, 2048), (64,) * 4, {"canonical": "svd"}),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    cases(BOUNDED, "linear, canonical and balanced", "ties to an energy", "core_ties", "robustmerge, canonical"),
)
def test_a_merge_holds_no_more_than_its_plan_says(tmp_path, case) -> None:
    method, shape, ranks, keys = BOUNDED[case]
    paths = [
        write_tiny_adapter(tmp_path / f"in{seed}", {"layers.0.q": shape}, rank=rank, seed=seed)
        for seed, rank in enumerate(ranks)
    ]
    warm = recipe_of([write_tiny_adapter(tmp_path / "warm", {"layers.0.q": (64, 64)}, rank=4)] * 2, method)
    recipe = recipe_of(paths, method, **keys)
    held = int(run(MEMORY, (warm, recipe, str(tmp_path / "out")), **RETURNING))
    # A little beside the module: thread stacks, the report, buffers of the numerical libraries.
    assert held < plan(recipe).peak_bytes + 8e6


TALL = Llama("tall", layers=1, width=512, keys=128, hidden=1024, words=48_000)
"""Its embedding takes 94 MiB as a dense update."""


def square_adapters(root, count, width, rank):
    return [
        write_tiny_adapter(
            root / f"in{seed}", {f"layers.{n}.q": (width, width) for n in range(4)}, rank=rank, seed=seed
        )
        for seed in range(count)
    ]


def dense_results(root):
    return recipe_of(square_adapters(root, 3, 3072, 8), "ties", space="delta", scale="auto")


def fine_tunes(root, method):
    paths = [write_fine_tune(root / f"tuned{seed}", TALL, seed) for seed in (1, 2)]
    return recipe_of(paths, method, base_model=str(write_base(root / "base", TALL)), output={"kind": "model"})


def a_fold(root):
    paths = write_set(root, TALL.linear, inputs=2, rank=8)
    return recipe_of(
        paths, "linear", base_model=str(write_base(root / "base", TALL, shards=2)), output={"kind": "model"}
    )


TIGHT = {
    "ties, results on disk": (dense_results, 72, {}),
    "ties of fine-tunes, results on disk": (lambda root: fine_tunes(root, "ties"), 64, {}),
    "drm of fine-tunes, results on disk": (lambda root: fine_tunes(root, "drm"), 128, {}),
    "ties by processes, results on disk": (dense_results, 96, {"executor": "processes", "workers": 2}),
    "a fold": (a_fold, 64, {}),
    "many inputs": (lambda root: recipe_of(square_adapters(root, 32, 1024, 8), "drm"), 80, {}),
    "many workers": (lambda root: recipe_of(square_adapters(root, 4, 2048, 16), "robustmerge"), 96, {"workers": 8}),
}


def written(directory: Path) -> str:
    paths = sorted(directory.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "case", cases(TIGHT, "drm of fine-tunes, results on disk", "ties by processes, results on disk", "many workers")
)
def test_a_merge_keeps_to_its_budget_and_what_lies_on_disk_changes_no_byte(tmp_path, case) -> None:
    make, mebibytes, options = TIGHT[case]
    budget, recipe = mebibytes << 20, make(tmp_path)
    tight = in_interpreter(recipe, tmp_path / "tight", memory_bytes=budget, **options)
    assert tight["peak_bytes"] <= budget
    if case.endswith("on disk"):
        ample = in_interpreter(recipe, tmp_path / "ample", memory_bytes=4 << 30, **options)
        assert ample["peak_bytes"] > budget
        assert written(tmp_path / "tight") == written(tmp_path / "ample")


def test_what_does_not_fit_even_in_blocks_is_refused_with_the_least_that_does(tmp_path) -> None:
    recipe = dense_results(tmp_path)
    with pytest.raises(
        MemoryBudgetError, match=r"with 72\.0 MiB more on disk.* Allow (.*) MiB with --memory"
    ) as caught:
        plan(recipe, memory_bytes=48 << 20)
    least = float(str(caught.value).split("Allow ")[1].split(" MiB")[0])
    made = plan(recipe, memory_bytes=int((least + 0.1) * (1 << 20)))
    assert made.peak_bytes + made.overhead_bytes <= made.memory_bytes
    assert {module.scratch_bytes for module in made.modules} == {2 * 3072 * 3072 * 4}
