"""``verify``: what an output, its manifest and its inputs prove of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from mergekit_lowrank.api import verify
from mergekit_lowrank.cli.tables import fields, one_line
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.recipe import bytes_of
from mergekit_lowrank.verification import Verification

__all__ = ["run_verify"]

SHOWN_FAULTS = 20
"""Of one kind; ``--json`` has all of them."""
FOUND_FAULTS = 2
"""The exit status, as of an error."""


def run_verify(
    output: str,
    *,
    recompute: bool,
    memory: str | None,
    device: str | None,
    executor: str | None,
    workers: int | None,
    as_json: bool,
    reporters: Sequence[Reporter],
) -> None:
    """Verify, and print what was proven, or every fault; exit status 2 where there is one."""
    found = verify(
        Path(output),
        recompute=recompute,
        memory_bytes=bytes_of(memory),
        device=device,
        executor=executor,
        workers=workers,
        reporters=reporters,
    )
    click.echo(found.to_json().rstrip() if as_json else "\n".join(_lines(found)))
    if not found.is_ok:
        click.get_current_context().exit(FOUND_FAULTS)


def _lines(found: Verification) -> Iterator[str]:
    count = len(found.faults)
    yield f"{one_line(found.location)}: " + ("verified" if found.is_ok else f"{count} fault{'s' * (count > 1)}")
    yield from fields([*_faults(found), *found.lines(), *(("note", text) for text in found.information)], indent="  ")


def _faults(found: Verification) -> Iterator[tuple[str, str]]:
    for kind in dict.fromkeys(fault.kind for fault in found.faults):
        alike = [fault for fault in found.faults if fault.kind == kind]
        yield from ((kind, str(fault)) for fault in alike[:SHOWN_FAULTS])
        if len(alike) > SHOWN_FAULTS:
            yield kind, f"… and {len(alike) - SHOWN_FAULTS} more; --json has all"
