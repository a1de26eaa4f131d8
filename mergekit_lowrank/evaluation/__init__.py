"""Whether a merge is any good: base, experts and merge judged by the user's own evaluators, with intervals."""

from mergekit_lowrank.evaluation.bootstrap import Estimate
from mergekit_lowrank.evaluation.evaluating import RESAMPLES, evaluate
from mergekit_lowrank.evaluation.outcomes import Outcome
from mergekit_lowrank.evaluation.results import Comparison, Evaluation, Run
from mergekit_lowrank.evaluation.tables import table
from mergekit_lowrank.evaluation.tasks import Find, Task, Tasks, load_tasks

__all__ = [
    "RESAMPLES",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Find",
    "Outcome",
    "Run",
    "Task",
    "Tasks",
    "evaluate",
    "load_tasks",
    "table",
]
