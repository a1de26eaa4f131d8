"""Job S8: what the command line costs before it does anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.benchmarks import ours
from tests.benchmarks.jobs import RANK, Bench, Job, new_job, summary
from tests.benchmarks.measuring import Contender, Figures, in_turn

HEAVY = ("huggingface_hub", "numpy", "peft", "pydantic", "ruamel.yaml", "safetensors", "torch", "tqdm", "transformers")
COMMAND_LINE = (sys.executable, "-m", "mergekit_lowrank.cli")
IMPORTED = (
    "import sys; from mergekit_lowrank.cli import main; sys.argv = ['mergekit-lowrank', '--help']\n"
    "try: main()\n"
    "except SystemExit: print(*sorted(sys.modules), file=sys.stderr)"
)
LEAST_RUNS = 5


def run_command(command: Sequence[str]) -> Figures:
    """Wall and processor seconds of a command, its start included."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_bytes": None}


def heavy_modules() -> list[str]:
    """Those of ``HEAVY`` that ``mergekit-lowrank --help`` imports."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True)
    return sorted(set(HEAVY) & set(done.stderr.split()))


def s8(bench: Bench) -> Job:
    """``--help`` and the plan of S1 against ``import torch``."""
    job = new_job(bench, "S8 start-up")
    model, inputs = bench.models()[0]
    recipe = bench.work / "s1.json"
    recipe.write_text(json.dumps(ours.METHODS["robustmerge"].recipe(bench.adapters(model, inputs), RANK)))
    commands = {
        "mergekit-lowrank --help": (*COMMAND_LINE, "--help"),
        "mergekit-lowrank plan (S1)": (*COMMAND_LINE, "plan", str(recipe)),
        'python -c "import torch"': (sys.executable, "-c", "import torch"),
        'python -c ""': (sys.executable, "-c", ""),
    }
    contenders = [Contender(name, run_command, (command,)) for name, command in commands.items()]
    found = in_turn(contenders, max(LEAST_RUNS, bench.runs))
    for name, runs in found.items():
        who = "ours" if name.startswith("mergekit") else "peer"
        job.rows.append({"model": "", **summary(name, runs, who=who)})
    help_seconds, torch_seconds = (job.rows[i]["seconds"]["median"] for i in (0, 2))
    job.target("--help under 0.3 × import torch", help_seconds / torch_seconds, "×", 0.3)
    job.remarks.append(f"`--help` imports, of what is heavy: {', '.join(heavy_modules()) or 'nothing'}.")
    return job
