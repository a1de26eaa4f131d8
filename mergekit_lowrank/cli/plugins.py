"""``plugins``: what is installed, what it registers, what failed to load and why, and what is disabled."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from mergekit_lowrank.cli.tables import fields, one_line
from mergekit_lowrank.errors import nearest_name
from mergekit_lowrank.hookspecs import API_VERSION
from mergekit_lowrank.registry import DISABLE_VARIABLE, PluginRecord, Registry

__all__ = ["run_plugins"]

NAMES_WIDTH = 90
"""Lists of names are broken into lines of this length, on a terminal or not."""


def run_plugins(*, as_json: bool) -> None:
    """Print every plugin; one that failed is no error here."""
    registry = Registry.load()
    if as_json:
        plugins = [asdict(record) for record in registry.plugins]
        said = {"api_version": API_VERSION, "plugins": plugins, "unmatched": list(registry.unmatched)}
        click.echo(json.dumps(said, indent=1))
        return
    paragraphs = ["\n".join(_described(record)) for record in registry.plugins]
    paragraphs += [_unmatched(name, registry.plugins) for name in registry.unmatched]
    click.echo("\n\n".join(paragraphs))


def _described(record: PluginRecord) -> Iterator[str]:
    yield _headline(record)
    yield from fields(_facts(record), indent="  ")


def _headline(record: PluginRecord) -> str:
    installed = f"{record.distribution} {record.version}".strip()
    if not installed or record.name == record.distribution:
        return one_line(installed or record.name)
    return one_line(f"{installed} (plugin '{record.name}')")


def _facts(record: PluginRecord) -> Iterator[tuple[str, str]]:
    if record.is_disabled:
        yield "disabled", f"by {DISABLE_VARIABLE}; it was not imported"
    if record.error:
        yield "FAILED", record.error
    for hook, names in record.registers.items():
        first, *rest = textwrap.wrap(", ".join(map(one_line, names)), NAMES_WIDTH)
        yield hook, first
        yield from (("", line) for line in rest)


def _unmatched(name: str, records: Sequence[PluginRecord]) -> str:
    known = {known for record in records[1:] for known in (record.name, record.distribution) if known}
    nearest = nearest_name(name, known)
    hint = f"; did you mean '{nearest}'?" if nearest else "."
    return f"{DISABLE_VARIABLE} names '{one_line(name)}', which is no installed plugin{hint}"
