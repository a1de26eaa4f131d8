"""Benchmarks of mergekit-lowrank beside its peers; writes WHERE/benchmarks.json and WHERE/benchmarks.md.

    pip install '.[bench]'
    python -m tests.benchmarks WHERE

Adapters of random factors are made under WHERE/adapters (1.1 GB) and kept for the next run. Jobs, with about what they
take on two processors:

    S1  RobustMerge against its authors' loop                       1 min
    S2  DRM against the dense joint SVD                             8 min
    S3  the exact sum at rank 16 against peft svd                  11 min
    S4  TIES, DARE-TIES in delta against peft *_svd                12 min
    S5  linear, TIES in factors against peft, whole models          6 min
    S6  KnOTS-TIES, Core-Space TIES, TSV-M against dense SVDs       5 min
    S7  growth in modules, inputs, rank, width                      6 min
    S8  start-up of the command line                                1 min

Results of jobs that are not run again are kept from WHERE/benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.benchmarks import jobs, tables
from tests.benchmarks.growth import s7
from tests.benchmarks.measuring import processors, say
from tests.benchmarks.shapes import LLAVA_7B
from tests.benchmarks.startup import s8

JOBS = {"S1": jobs.s1, "S2": jobs.s2, "S3": jobs.s3, "S4": jobs.s4, "S5": jobs.s5, "S6": jobs.s6, "S7": s7, "S8": s8}
VERSIONS = ("mergekit-lowrank", "torch", "numpy", "safetensors", "peft", "transformers")
MEMORY_BYTES = 1 << 30


def processor_name() -> str:
    """The model of the processor, where the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(bench: jobs.Bench) -> dict[str, Any]:
    """Where, with what and when figures were found."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    settings = {key: value for key, value in asdict(bench).items() if key != "where"}
    return {
        "processor": processor_name(),
        "processors": processors(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "settings": settings,
    }


def shared_targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets of one job against another, and of all together."""
    mine = {name: [row for row in job["rows"] if row["who"] == "ours"] for name, job in found.items()}
    targets = []
    for name, bound in (("S2", 12), ("S3", 6)):
        if name in mine and "S1" in mine:
            slowest = max(row["seconds"]["median"] for row in mine[name] if row["model"] == LLAVA_7B.name)
            ratio = slowest / mine["S1"][0]["seconds"]["median"]
            targets.append({"target": f"{name} within {bound} × S1", "found": f"{ratio:.3g} ×", "met": ratio <= bound})
    peaks = [row["peak_bytes"] for rows in mine.values() for row in rows if row["peak_bytes"] is not None]
    if peaks:
        met = max(peaks) <= MEMORY_BYTES
        targets.append({"target": "memory below 1 GiB", "found": tables.mebibytes(max(peaks)), "met": met})
    return targets


def all_targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every job, with its name; figures of narrowed models say nothing about them."""
    if any(job["environment"]["settings"]["quick"] for job in found.values()):
        return []
    own = [
        {**target, "target": f"{name}: {target['target']}"}
        for name, job in sorted(found.items())
        for target in job["targets"]
    ]
    return own + shared_targets(found)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("where", type=Path, help="a directory for adapters and results, with 8 GB free")
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="S1", help="some of S1 to S8; all by default")
    add("--runs", type=int, help="of each contender; 3 by default (those above a minute, and dense SVDs: 1)")
    add("--layers", type=int, help="of the models; 32 by default")
    add("--inputs", type=int, help="adapters of every merge; by default 8 of LLaVA-7B, 5 of Llama-3.1-8B")
    add("--no-peers", action="store_true", help="ours and the physical limit only")
    add("--quick", action="store_true", help="widths divided by 8, 2 layers, 1 run: does it work?")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the jobs, and write what was found after each of them."""
    args = parsed(arguments)
    bench = jobs.Bench(
        where=args.where.resolve(),
        runs=args.runs or (1 if args.quick else 3),
        layers=args.layers or (2 if args.quick else 32),
        inputs=args.inputs,
        peers=not args.no_peers,
        quick=args.quick,
    )
    shutil.rmtree(bench.work, ignore_errors=True)  # of a run that was interrupted
    bench.work.mkdir(parents=True)
    target = bench.where / "benchmarks.json"
    found = json.loads(target.read_text())["jobs"] if target.exists() else {}
    for name in args.jobs:
        start = time.perf_counter()
        job = JOBS[name](bench)
        found[name] = {**asdict(job), "environment": environment(bench)}
        results = {"jobs": found, "targets": all_targets(found)}
        target.write_text(json.dumps(results, indent=1) + os.linesep)
        target.with_suffix(".md").write_text(tables.page(results))
        say(f"{name} took {time.perf_counter() - start:.0f} s; see {target.with_suffix('.md')}")
    shutil.rmtree(bench.work)


if __name__ == "__main__":
    main()
