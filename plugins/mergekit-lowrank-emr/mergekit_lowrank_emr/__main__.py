"""``python -m mergekit_lowrank_emr MERGED TASK OUTPUT``: a task's adapter out of a merge with ``emr``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lowrank import MergeError
from mergekit_lowrank_emr.restoring import restore


@click.command(help=__doc__)
@click.argument("merged", type=click.Path(path_type=Path))
@click.argument("task")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT where it exists.")
def main(merged: Path, task: str, output: Path, overwrite: bool) -> None:
    """TASK is the label of an input, as the model card names it, or its position in the recipe."""
    try:
        click.echo(restore(merged, task, output, overwrite=overwrite))
    except MergeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(prog_name="python -m mergekit_lowrank_emr")
