"""``check``: what a server would do with one adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten

import click

from mergekit_lowrank.cli.tables import aligned, fields, one_line
from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.errors import CheckpointError, nearest_name
from mergekit_lowrank.formats import Checkpoint
from mergekit_lowrank.recipe import resolve_model
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.servers import SERVERS, Server, Verdict

__all__ = ["run_check"]

COLUMNS = ("server", "verdict")
VERDICT_WIDTH = 86
"""Of a verdict in the table of all servers, in columns: a line of it has fewer than 100."""
FOUND_PROBLEMS = 2
"""The exit status, as of an error, where a server would refuse, drop or misapply something."""

Verdicts = Mapping[str, Sequence[Verdict]]


def run_check(reference: str, target: str | None, *, as_json: bool) -> None:
    """Open an adapter's headers and print what each server, or the one named, would do with it."""
    servers = [_server(target)] if target else [*SERVERS.values()]
    path = resolve_model(reference, Path.cwd())
    checkpoint = _opened(path)
    found = {server.name: server.judge(checkpoint, called=reference) for server in servers}
    if as_json:
        click.echo(json.dumps(_as_dict(reference, found), indent=1))
    else:
        click.echo("\n".join(_report(reference, servers[0], found) if target else _overview(found)))
    if target and any(verdict.is_fatal for verdict in found[target]):
        click.get_current_context().exit(FOUND_PROBLEMS)


def _opened(path: Path) -> Checkpoint:
    registry = Registry.load()
    file = path if path.suffix == ".gguf" else next(path.glob("*.gguf"), None)
    if file is not None and not any(cls().recognises(path) for cls in registry.formats.values()):
        raise CheckpointError(
            f"'{file}' is a GGUF file, which is written here and not read: what llama.cpp would not load is refused "
            "when it is written. Check the adapter that it was made of."
        )
    return open_checkpoint(path, registry, label=path.resolve().name)


def _server(name: str) -> Server:
    if name not in SERVERS:
        guess = nearest_name(name, SERVERS)
        hint = f" Did you mean {guess}?" if guess else ""
        raise click.BadParameter(f"'{name}' is none of {', '.join(SERVERS)}.{hint}", param_hint="--target")
    return SERVERS[name]


def _report(reference: str, server: Server, found: Verdicts) -> Iterator[str]:
    verdicts = found[server.name]
    yield f"{one_line(reference)} in {server.name}, by the rules of {server.version}: {_summary(verdicts)}"
    alike: dict[tuple[str, str], list[str]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.is_fatal):
        alike.setdefault(("problem" if verdict.is_fatal else "remark", verdict.advice), []).append(verdict.what)
    for (kind, advice), whats in alike.items():  # one remedy may be that of several
        yield from fields([*((kind, what) for what in whats), ("", advice)], indent="  ")


def _overview(found: Verdicts) -> Iterator[str]:
    yield from aligned(COLUMNS, ((name, _line(verdicts)) for name, verdicts in found.items()))


def _line(verdicts: Sequence[Verdict]) -> str:
    first = next((verdict.what for verdict in verdicts if verdict.is_fatal), None)
    if first is None:
        return _summary(verdicts)
    reason, _, _ = first.partition(": '")  # without the names of modules
    return shorten(f"{_summary(verdicts)}: {reason}", VERDICT_WIDTH, placeholder=" …")


def _summary(verdicts: Sequence[Verdict]) -> str:
    problems = sum(verdict.is_fatal for verdict in verdicts)
    remarks = len(verdicts) - problems
    counted = [
        f"{count} {name}{'s' * (count > 1)}" for count, name in ((problems, "problem"), (remarks, "remark")) if count
    ]
    return ", ".join(counted if problems else ["ok", *counted])


def _as_dict(reference: str, found: Verdicts) -> dict[str, object]:
    return {
        "location": reference,
        "servers": [
            {
                "server": name,
                "version": SERVERS[name].version,
                "is_fatal": any(verdict.is_fatal for verdict in verdicts),
                "verdicts": [asdict(verdict) for verdict in verdicts],
            }
            for name, verdicts in found.items()
        ],
    }
