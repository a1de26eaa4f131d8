#!/usr/bin/env python3
"""Whole merges of adapters with the shapes of LLaVA-7B, ours beside peft's ``add_weighted_adapter`` on the same files.

    python tests/benchmarks/llava.py ROOT [--layers 32] [--inputs 8] [--rank 16] [--runs 3] [--jobs NAME ...]

Every job runs in a process of its own, ours and peft's in turn. Measured: wall seconds from the first file read to
the last file written (imports apart), processor seconds, and peak anonymous memory beyond that of the process with
torch and the libraries loaded. peft gets a base model whose weights
take no memory. Its ``svd`` types are timed on one module of each shape and extrapolated to the model, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LLAVA_7B, write_set

OURS = ("linear", "robustmerge", "drm", "knots", "core_ties", "ties")
PEFT_WHOLE = ("linear", "ties", "cat")
PEFT_MODULES = ("svd", "ties_svd")


def anonymous_bytes() -> int:
    """Anonymous memory of this process now."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds and peak memory of one call."""
    before, peak, stop = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), sum(os.times()[:2])
    work()
    wall, cpu = time.perf_counter() - wall, sum(os.times()[:2]) - cpu
    stop.set()
    watcher.join()
    return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_mib": (max(peak, before) - before) / 2**20}


def run_ours(method: str, paths: list[str], out: str) -> dict[str, float]:
    """One merge to rank 16 by this package, hashes of the sources included."""
    from mergekit_lowrank import merge

    recipe = {"merge_method": method, "models": [{"model": path} for path in paths], "output": {"rank": "max"}}
    import mergekit_lowrank.report  # noqa: F401 - loaded before the clock starts

    return measured(lambda: merge(recipe, out, overwrite=True))


def skeleton(layers: int, shapes: dict[str, tuple[int, int]]):
    """A model of linear layers whose weights share one number."""
    import torch
    from torch import nn

    root = nn.Module()
    root.model = nn.Module()
    root.model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        for name, (d_out, d_in) in shapes.items():
            parent, _, leaf = name.partition(".")
            linear = nn.Linear(1, 1, bias=False, dtype=torch.float16)
            linear.in_features, linear.out_features = d_in, d_out
            linear.weight = nn.Parameter(
                torch.zeros(1, 1, dtype=torch.float16).expand(d_out, d_in), requires_grad=False
            )
            setattr(getattr(layer, parent), leaf, linear)
        root.model.layers.append(layer)
    root.config = {"model_type": "custom"}
    root.forward = lambda *_, **__: None
    return root


def run_peft(
    method: str, paths: list[str], out: str, layers: int, shapes: dict[str, tuple[int, int]]
) -> dict[str, float]:
    """Load, add_weighted_adapter, save: what a peft user does."""
    from peft import PeftModel

    base = skeleton(layers, shapes)
    extra = {"density": 0.2} if "ties" in method else {}

    def work() -> None:
        model = PeftModel.from_pretrained(base, paths[0], adapter_name="a0")
        for i, path in enumerate(paths[1:], 1):
            model.load_adapter(path, f"a{i}")
        names = [f"a{i}" for i in range(len(paths))]
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=method, **extra)
        model.save_pretrained(out, selected_adapters=["merged"])

    return measured(work)


def run_peft_modules(method: str, inputs: int, rank: int) -> dict[str, object]:
    """Seconds of the merge of one module of each shape, adapters in memory; loading and saving apart."""
    import torch
    from peft import LoraConfig, get_peft_model

    seconds: dict[str, float] = {}
    peak = 0.0
    for shape in dict.fromkeys(LLAVA_7B.values()):
        model = get_peft_model(skeleton(1, {"mlp.x": shape}), LoraConfig(r=rank, target_modules=["x"]), "a0")
        for i in range(1, inputs):
            model.add_adapter(f"a{i}", LoraConfig(r=rank, target_modules=["x"]))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        extra = {"density": 0.2} if "ties" in method else {}
        names = [f"a{i}" for i in range(inputs)]
        result = measured(
            lambda m=model, n=names, e=extra: m.add_weighted_adapter(
                n, [1.0] * len(n), "merged", combination_type=method, svd_rank=rank, **e
            )
        )
        seconds["x".join(map(str, shape))] = result["wall_seconds"]
        peak = max(peak, result["peak_mib"])
    return {"module_seconds": seconds, "peak_mib": peak}


def child(spec: dict) -> None:
    """Run one job and print its figures."""
    if spec["who"] == "ours":
        result = run_ours(spec["method"], spec["paths"], spec["out"])
    elif spec["method"] in PEFT_MODULES:
        result = run_peft_modules(spec["method"], len(spec["paths"]), spec["rank"])
    else:
        result = run_peft(spec["method"], spec["paths"], spec["out"], spec["layers"], LLAVA_7B)
    sys.stdout.write(json.dumps(result))


def run_job(spec: dict, runs: int) -> dict:
    """A job's median figures over ``runs`` processes."""
    results = []
    for _ in range(runs):
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shutil.rmtree(spec["out"], ignore_errors=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        results.append(json.loads(done.stdout))
    if "module_seconds" in results[0]:
        counts = Counter("x".join(map(str, shape)) for shape in LLAVA_7B.values())
        per_layer = sum(counts[shape] * seconds for shape, seconds in results[0]["module_seconds"].items())
        return {**results[0], "extrapolated_wall_seconds": per_layer * spec["layers"]}
    spread = {key: [result[key] for result in results] for key in results[0]}
    return {key: {"median": statistics.median(v), "min": min(v), "max": max(v)} for key, v in spread.items()}


def main() -> None:
    """Write ROOT/llava.json with every job's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", help="such as ours:drm peft:ties; all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    paths = [str(path) for path in write_set(args.root, inputs=args.inputs, layers=args.layers, rank=args.rank)]
    everything = [f"peft:{m}" for m in (*PEFT_WHOLE, *PEFT_MODULES)] + [f"ours:{m}" for m in OURS]
    target = args.root / "llava.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    for job in args.jobs or everything:
        who, _, method = job.partition(":")
        spec = {"who": who, "method": method, "paths": paths, "out": str(args.root / "out")}
        spec |= {"layers": args.layers, "rank": args.rank}
        found[job] = run_job(spec, 1 if method in PEFT_MODULES else args.runs)
        found["machine"] = {
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "python": sys.version.split()[0],
        }
        target.write_text(json.dumps(found, indent=1))
        sys.stdout.write(f"{job}: {json.dumps(found[job])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
