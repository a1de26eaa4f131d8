"""Prints what each kill left, and whether all outputs came out the same.

python -m tests.crashes [--kills 50] [--seed 0] [--recipe RECIPE] [--executor NAME]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import click

from mergekit_lowrank import plan_variants
from tests.crashes.killing import Kill, Killer

RECIPE = Path(__file__).parents[2] / "recipes" / "ties.yaml"


def main() -> None:
    """Kill merges of a recipe; the exit status is 1 where one came out different."""
    parser = argparse.ArgumentParser(prog="python -m tests.crashes", description="Merges killed at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--executor", default="threads")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        killer = Killer(given.recipe, Path(root), seed=given.seed, executor=given.executor)
        modules = sum(len(made.modules) for made in plan_variants(given.recipe).values())
        click.echo(f"a merge of {modules} modules takes {killer.whole_seconds:.1f} s; seed {given.seed}")
        kills = []
        for kill in killer.kills(given.kills):
            kills.append(kill)
            click.echo(f"{len(kills):3} {described(kill)}")
    same = sum(kill.is_same for kill in kills)
    click.echo(f"{same} of {len(kills)} came out the same")
    raise SystemExit(same != len(kills))


def described(kill: Kill) -> str:
    """One line."""
    left = "nothing" if kill.finished is None else f"{kill.finished} finished"
    left = "the whole output" if kill.is_complete else left
    old = ", the old output intact" if kill.replaced and not kill.is_complete else ""
    end = "the same bytes" if kill.is_same else "OTHER BYTES"
    return f"after {kill.seconds:5.2f} s: {left}{old}; resumed in {kill.resumed_seconds:.1f} s: {end}"


if __name__ == "__main__":
    main()
