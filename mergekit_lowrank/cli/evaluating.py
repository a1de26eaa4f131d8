"""``evaluate``: base, experts and merge on the same tasks, and what of their differences is noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from mergekit_lowrank.cli.group import INTERRUPTED, Stopped
from mergekit_lowrank.cli.tables import aligned
from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation import Comparison, Evaluation, evaluate, table
from mergekit_lowrank.events import Reporter

__all__ = ["run_evaluate"]

ADVICE = "add -o FILE so that finished runs are kept"


def run_evaluate(
    target: str,
    tasks: str,
    *,
    against: str | None,
    keep: str | None,
    output: str | None,
    resamples: int,
    seed: int,
    timeout: float | None,
    as_json: bool,
    reporters: Sequence[Reporter],
) -> None:
    """Evaluate, and print the table or the JSON; the warnings stand in either."""
    try:
        found = evaluate(
            Path(target),
            Path(tasks),
            against=against,
            keep=keep,
            results=output,
            resamples=resamples,
            seed=seed,
            timeout=timeout,
            reporters=reporters,
        )
    except EvaluationError as error:
        if output is not None:
            raise
        raise EvaluationError(f"{error}\n{ADVICE}") from error
    except KeyboardInterrupt as error:
        so_far = f"the runs so far are in {output}; run the same command again to go on"
        kept = so_far if output else f"nothing is kept; {ADVICE}"
        raise Stopped(INTERRUPTED, f"interrupted: {kept}") from error
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: Evaluation) -> Iterator[str]:
    columns, rows, right = table(found)
    yield from aligned(columns, rows, right=right)
    yield ""
    if any(row.basis != "none" for row in found.tasks):
        yield _legend(found)
    for row in filter(None, (found.seen, found.unseen)):
        yield from _verdicts(row)
    for warning in found.warnings:
        yield f"warning: {warning}"


def _legend(found: Evaluation) -> str:
    is_paired = all(row.basis == "examples" for row in found.tasks)
    drawn = "resamples of the examples, the same ones for all models" if is_paired else "resamples"
    return f"in brackets: {100 * found.confidence:g} % intervals, from {found.resamples:,} {drawn}"


def _verdicts(row: Comparison) -> Iterator[str]:
    """In words, what the means say."""
    for difference, other in ((row.gain, "the base"), (row.lead, "the other merge")):
        if difference is None or difference.low is None:
            continue
        if not difference.is_beyond_noise:
            yield f"{row.name}: the difference to {other} is within noise"
        else:
            yield f"{row.name}: the merge is {'better' if difference.value > 0 else 'worse'} than {other} beyond noise"
