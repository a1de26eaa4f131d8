"""``plugins``: what is installed, what it registers, and what failed to load."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mergekit_lowrank.cli.tables import aligned
from mergekit_lowrank.registry import PluginRecord, Registry

__all__ = ["run_plugins"]


def run_plugins(*, as_json: bool) -> None:
    """Print every plugin; one that failed is no error here."""
    records = Registry.load().plugins
    if as_json:
        click.echo(json.dumps([asdict(record) for record in records], indent=1))
        return
    rows = ((record.name, record.distribution or "-", record.version or "-", _outcome(record)) for record in records)
    click.echo("\n".join(aligned(("plugin", "distribution", "version", "registers"), rows)))


def _outcome(record: PluginRecord) -> str:
    if record.error:
        return f"FAILED: {record.error}"
    return "; ".join(f"{hook}: {', '.join(names)}" for hook, names in record.registers.items()) or "nothing"
