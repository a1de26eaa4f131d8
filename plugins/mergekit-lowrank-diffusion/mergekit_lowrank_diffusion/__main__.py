"""``mergekit-lowrank-blocks PRESET --base BASE``: a preset of block weights as a weights file."""

from __future__ import annotations

import click

from mergekit_lowrank import MergeError
from mergekit_lowrank_diffusion.blocks import BASES, PRESETS, UNIFORM, as_csv, block_weights


@click.command(help=f"Print the weights file of PRESET: {', '.join((*UNIFORM, *PRESETS))}, or numbers with commas.")
@click.argument("preset")
@click.option("--base", type=click.Choice(list(BASES)), required=True, help="The kind of base model.")
def main(preset: str, base: str) -> None:
    """Give its path to a recipe, as ``weight: {file: weights.csv}``."""
    try:
        click.echo(as_csv(block_weights(preset, base)))
    except MergeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(prog_name="mergekit-lowrank-blocks")
