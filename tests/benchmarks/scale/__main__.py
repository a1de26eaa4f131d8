"""What merges hold and how fast models are folded; writes WHERE/scale.json and WHERE/scale.md.

    pip install '.[bench]'
    python -m tests.benchmarks.scale WHERE

Models and adapters of random weights are made under WHERE (18 GB) and kept for the next run. Jobs, with about what they
take on two processors:

    M1  RobustMerge, linear and DRM of 70B adapters, all layers and few, three budgets    20 min
    M2  TIES on dense matrices larger than the budget                                     15 min
    M3  many inputs, many workers                                                         10 min
    M4  folding into a 6 GB and a 1.6 GB base, beside cp and peft                         10 min
    M5  TIES and DRM on full fine-tunes, beside the dense formulas                        25 min

Results of jobs that are not run again are kept from WHERE/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.__main__ import environment
from tests.benchmarks.measuring import say
from tests.benchmarks.scale.jobs import JOBS, Bench
from tests.benchmarks.tables import environment_line, target_table


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("where", type=Path, help="a directory on a disk (not in memory) with 40 GB free")
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="M1", help="some of M1 to M5; all by default")
    add("--runs", type=int, help="of what is timed or compared; 3 by default")
    add("--no-peers", action="store_true", help="without peft")
    add("--quick", action="store_true", help="widths divided by 16, 1 run: does it work?")
    return parser.parse_args(arguments)


def page(results: dict[str, Any]) -> str:
    """All jobs as Markdown."""
    found = dict(sorted(results.items()))
    where = next(iter(found.values()))["environment"]
    targets = [target for job in found.values() for target in job["targets"]]
    parts = [environment_line(where) + "\n"]
    if not where["settings"]["quick"]:  # small models say nothing about large ones
        parts.append(target_table(targets))
    return "\n".join([*parts, *(job["text"] for job in found.values())])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the jobs, and write what was found after each of them."""
    args = parsed(arguments)
    runs = args.runs or (1 if args.quick else 3)
    bench = Bench(args.where.resolve(), runs=runs, peers=not args.no_peers, quick=args.quick)
    shutil.rmtree(bench.out.parent, ignore_errors=True)  # of a run that was interrupted
    bench.out.parent.mkdir(parents=True)
    target = bench.where / "scale.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    for name in args.jobs:
        start, load = time.perf_counter(), os.getloadavg()[0]
        job = JOBS[name](bench)
        job.remarks.append(f"Load average at the start: {load:.1f}.")
        found[name] = {**asdict(job), "text": job.text, "environment": environment(bench)}
        target.write_text(json.dumps(found, indent=1) + os.linesep)
        target.with_suffix(".md").write_text(page(found))
        say(f"{name} took {time.perf_counter() - start:.0f} s; see {target.with_suffix('.md')}")
    shutil.rmtree(bench.out.parent)


if __name__ == "__main__":
    main()
