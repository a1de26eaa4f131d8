"""``evaluate``: judge base, experts and merge by the same evaluators, and say what of the difference is noise."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from mergekit_lowrank.api import merge
from mergekit_lowrank.engine import open_inputs
from mergekit_lowrank.errors import OutputError, RecipeError, nearest_name
from mergekit_lowrank.evaluation.comparing import Row, mean_row, row_of
from mergekit_lowrank.evaluation.evaluators import Evaluators, evaluators_of
from mergekit_lowrank.evaluation.ledger import Ledger
from mergekit_lowrank.evaluation.outcomes import Outcome
from mergekit_lowrank.evaluation.results import Evaluation
from mergekit_lowrank.evaluation.subjects import BASE, Subject, subjects_of
from mergekit_lowrank.evaluation.tasks import Tasks, load_tasks
from mergekit_lowrank.events import Event, Notice, Reporter
from mergekit_lowrank.formats import Checkpoint
from mergekit_lowrank.recipe import Recipe
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report import Report
from mergekit_lowrank.requests import RecipeLike, as_recipe, refuse_below_one
from mergekit_lowrank.runs import Followers

__all__ = ["RESAMPLES", "evaluate"]

RESAMPLES = 10_000
"""The ends of an interval then differ by some hundredths of its width from seed to seed."""
FEW = 30
"""Examples below which an interval is not to be relied on."""
RECIPE_NAME = "recipe.yaml"


def evaluate(
    target: RecipeLike,
    tasks: Tasks | Mapping[str, Any] | str | PathLike[str],
    *,
    against: str | Path | None = None,
    keep: str | Path | None = None,
    results: str | Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    timeout: float | None = None,
    registry: Registry | None = None,
    reporters: Sequence[Reporter] = (),
) -> Evaluation:
    """Base, experts and merge on the same tasks, with 95 % intervals.

    Args:
        target: the output directory of a merge; or a recipe, which is merged first.
        tasks: a tasks file, or the same as a mapping. Its commands and functions are run as they stand.
        against: the output directory of another merge of the same experts, to compare with.
        keep: where the merge of a recipe is left; by default it is deleted.
        results: a file that holds every run as soon as it is done. Runs that it has already are not done again.
        resamples: replicates of the bootstrap.
        seed: of its draws.
        timeout: seconds that a command may take; by default what the tasks file says.
        registry: what there is to merge with.
        reporters: followers of the merge, told of every run too.

    Raises:
        RecipeError: problems of the recipe or the tasks; they are found before anything is run.
        EvaluationError: an evaluator failed.
        MergeError: the merge did.
    """
    refuse_below_one(resamples=resamples)
    registry, judged, recipe = registry or Registry.load(), load_tasks(tasks), _recipe_of(target)
    opened = open_inputs(recipe, registry).checkpoints
    labels = [checkpoint.label for checkpoint in opened]
    absent, base = [*_absent(judged, labels)], _base_of(judged, recipe, opened)
    begun = Evaluation(target=_name_of(target), against=_text(against), base=base, resamples=resamples, seed=seed)
    ledger, followers = Ledger.of(None if results is None else Path(results), begun), Followers(reporters)
    with (
        closing(followers),
        evaluators_of(judged, base, timeout) as evaluators,
        _merged(target, recipe, keep, registry, followers) as (directory, warnings),
    ):
        subjects = subjects_of(judged, recipe, opened, base, directory, _path(against))
        outcomes = _judge(evaluators, subjects, ledger, followers)
    rows = [
        row_of(name, task.expert if task.expert in labels else None, outcomes[name], resamples=resamples, seed=seed)
        for name, task in judged.tasks.items()
    ]
    return ledger.close(_compared(begun, rows, [*warnings, *absent, *followers.warnings]))


def _recipe_of(target: RecipeLike) -> Recipe:
    """The recipe, or that of the merge in a directory."""
    if not isinstance(target, str | Path) or not Path(target).is_dir():
        return as_recipe(target)
    path = Path(target) / RECIPE_NAME
    if not path.is_file():
        raise RecipeError(
            f"{target}: has no {RECIPE_NAME}, so it is not the output of a merge, and its experts are not known; name "
            "a recipe or such an output"
        )
    return as_recipe(path)


def _name_of(target: RecipeLike) -> str:
    return str(target) if isinstance(target, str | Path) else "recipe"


def _path(directory: str | Path | None) -> Path | None:
    return None if directory is None else Path(directory)


def _text(directory: str | Path | None) -> str | None:
    return None if directory is None else str(directory)


def _absent(tasks: Tasks, labels: Sequence[str]) -> Iterator[str]:
    """What is to be known of tasks whose experts are no models of the recipe.

    Raises:
        RecipeError: none is.
    """
    absent = {name: task.expert for name, task in tasks.tasks.items() if task.expert and task.expert not in labels}
    if absent and not any(task.expert in labels for task in tasks.tasks.values()):
        (first, expert), *_ = absent.items()
        raise tasks.problem(
            ("tasks", first, "expert"),
            f"'{expert}' is no model of the recipe, nor is any task's; its models are {', '.join(labels)}",
        )
    if absent:
        named = (f"{name}, whose expert is '{expert}'{_guess(expert, labels)}" for name, expert in absent.items())
        yield f"counted as unseen, since the recipe has no such model: {'; '.join(named)}"


def _guess(expert: str, labels: Sequence[str]) -> str:
    nearest = nearest_name(expert, labels)
    return f" (did you mean '{nearest}'?)" if nearest else ""


def _base_of(tasks: Tasks, recipe: Recipe, opened: Sequence[Checkpoint]) -> str:
    """What ``{base}`` stands for."""
    for named, start in ((tasks.base, tasks.directory), (recipe.base_model, recipe.directory)):
        if named is not None:
            return str(start / named) if (start / named).exists() else named
    of_adapters = next((checkpoint.base_model for checkpoint in opened if checkpoint.base_model), None)
    if of_adapters is None:
        raise tasks.problem((), "no model of the recipe names its base; write it under 'base'")
    return of_adapters


class _Relay(Reporter):
    """Hands on what the merge says, and outlives it: the runs come after it."""

    name: ClassVar[str] = "relay"
    summary: ClassVar[str] = "hands on what the merge of an evaluation says"

    def __init__(self, followers: Followers) -> None:
        self._followers = followers

    def handle(self, event: Event) -> None:
        """Hand it on."""
        self._followers.tell(event)


@contextmanager
def _merged(
    target: RecipeLike, recipe: Recipe, keep: str | Path | None, registry: Registry, followers: Followers
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The directory of the merge, which is made where ``target`` is a recipe, and the warnings of making it."""
    if isinstance(target, str | Path) and Path(target).is_dir():
        if keep is not None:
            raise OutputError(f"{keep}: nothing is merged that could be kept, since {target} is merged already")
        yield Path(target), ()
        return
    if recipe.sweep:
        raise recipe.problem(("sweep",), "merge the variants first, and evaluate their directories one by one")
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        directory = Path(scratch) / "merged" if keep is None else Path(keep)
        report = merge(recipe, directory, registry=registry, reporters=[_Relay(followers)])
        yield directory, report.warnings if isinstance(report, Report) else ()


def _judge(
    evaluators: Evaluators, subjects: Sequence[Subject], ledger: Ledger, followers: Followers
) -> dict[str, dict[str, Outcome]]:
    """The outcomes of each task by role."""
    found: dict[str, dict[str, Outcome]] = {name: {} for name in evaluators.tasks.tasks}
    for subject in subjects:
        for name in subject.tasks:
            if evaluators.can_judge(name, subject.path):
                found[name][subject.role] = _outcome(evaluators, subject, name, ledger, followers)
    return found


def _outcome(evaluators: Evaluators, subject: Subject, task: str, ledger: Ledger, followers: Followers) -> Outcome:
    key, start = subject.key(task, evaluators.tasks.tasks[task]), time.perf_counter()
    known = ledger.known(key)
    if known is not None:
        outcome, told = known.outcome, f"in {ledger.path}"
    else:
        followers.tell(Notice(f"{task}: {subject.label} is being judged"))
        outcome = evaluators.outcome(task, subject.path)
        seconds = time.perf_counter() - start
        ledger.add(key, task, subject.label, outcome, seconds)
        told = f"in {seconds:.1f} s"
    followers.tell(Notice(f"{task}: {subject.label} {outcome.score:.4g} ({told})"))
    return outcome


def _compared(begun: Evaluation, rows: Sequence[Row], warnings: Sequence[str]) -> Evaluation:
    """The evaluation with its tables."""
    seen = [row for row in rows if row.expert is not None]
    unseen = [row for row in rows if row.expert is None]
    return begun.model_copy(
        update={
            "is_complete": True,
            "tasks": tuple(row.comparison() for row in rows),
            "seen": mean_row("mean of seen tasks", seen).comparison() if seen else None,
            "unseen": mean_row("mean of unseen tasks", unseen).comparison() if unseen else None,
            "warnings": (*warnings, *_warnings(rows)),
        }
    )


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    """What is to be known of the figures, several tasks in one sentence."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        for why in _reservations(row):
            grouped.setdefault(why, []).append(row.name)
    for why, names in grouped.items():
        yield f"{', '.join(names)}: {why}"


def _reservations(row: Row) -> Iterator[str]:
    if BASE not in row.samples:
        yield "the base was not evaluated; add base_command"
    if row.examples is not None and row.examples < FEW:
        yield f"fewer than {FEW} examples, so that intervals are rough and tend to be too narrow; add examples"
    if row.basis == "examples" and any(sample.replicates is None for sample in row.samples.values()):
        yield "some intervals are missing, since every example came out alike; add examples that tell models apart"
    if "own" in row.samples and "normalised" not in row.samples:
        yield "the expert's score is not above 0, so no share of it is defined"
    match row.basis:
        case "none":
            yield "no intervals, since a score alone does not say how sure it is; add examples, count or stderr"
        case "count":
            yield "intervals are binomial and not paired, so those of differences are too wide; add examples"
        case "stderr":
            yield "intervals are normal and not paired, so those of differences are too wide; add examples"
