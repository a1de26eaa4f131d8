"""Prints what readers did with mutated files, and every case in which they did what they should not.

python -m tests.fuzzing [--cases 100000] [--seed 0] [--only TARGET] [--case NUMBER] [--json FILE]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from tests.fuzzing.guard import peak_bytes
from tests.fuzzing.running import Fuzzer, Tally

ADDRESS_SPACE = 4 << 30  # beyond what is mapped at the start: what asks for more is told that there is none
STUCK_SECONDS = 120  # after which a case that no signal reaches ends the run, with the place where it hangs


def main() -> None:
    """Fuzz all targets, or one; the exit status is 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description="Readers given mutated files.")
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    parser.add_argument("--case", type=int, help="one case of it; its files are left where it says")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root), seed=given.seed)
        limit_memory()
        names = [given.only] if given.only else list(fuzzer.targets)
        if given.case is not None:
            click.echo(fuzzer.case(names[0], given.case))
            click.echo(f"its files: {fuzzer.keep(Path(tempfile.mkdtemp()))}")
            return
        tallies = {name: fuzzed(fuzzer, name, -(-given.cases // len(names))) for name in names}
    if given.json:
        given.json.write_text(json.dumps({"seed": given.seed, **figures(tallies)}, indent=1) + "\n")
    failed = sum(len(tally.failures) for tally in tallies.values())
    click.echo(
        f"{sum(tally.cases for tally in tallies.values())} cases, {failed} failed; peak {peak_bytes() >> 20} MiB"
    )
    raise SystemExit(failed > 0)


def limit_memory() -> None:
    """Let the process map so much more than it has now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)


def fuzzed(fuzzer: Fuzzer, name: str, count: int) -> Tally:
    """Run the cases of one target, and print what came out."""
    tally, start = Tally(), time.perf_counter()
    for case in fuzzer.cases(name, range(count)):
        if case.number % 100 == 0:
            faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
        tally.add(case)
        if case.failure:
            click.echo(f"  --only '{name}' --case {case.number}: {case.failure}")
    faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - start
    longest = tally.longest.seconds if tally.longest else 0.0
    click.echo(
        f"{name:14} {tally.cases:7} cases in {seconds:5.0f} s, {tally.outcomes['read']:6} read, "
        f"{len(tally.outcomes):5} outcomes, longest {longest * 1000:5.0f} ms, "
        f"{tally.grown_bytes >> 20:4} MiB more, {len(tally.failures)} failed"
    )
    return tally


def figures(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Of all targets, as JSON."""
    found = {}
    for name, tally in tallies.items():
        assert tally.longest is not None
        found[name] = {
            "cases": tally.cases,
            "read": tally.outcomes["read"],
            "distinct_outcomes": len(tally.outcomes),
            "longest_seconds": round(tally.longest.seconds, 4),
            "longest_case": tally.longest.number,
            "grown_bytes": tally.grown_bytes,
            "failures": {str(case.number): case.failure for case in tally.failures},
            "outcomes": dict(tally.outcomes.most_common(20)),
        }
    return {"peak_bytes": peak_bytes(), "targets": found}


if __name__ == "__main__":
    main()
