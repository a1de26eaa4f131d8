"""Accuracy of PEFT adapters for all-MiniLM-L6-v2 on eight real tasks, as JSON.

    python tests/benchmarks/accuracy/evaluate.py base recipes/adapters/spam merged/

Standard errors cover the sampling of test examples only. ``share_of_experts`` (accuracy on a seen task over that of
its own expert, averaged) needs the experts' accuracies from results.json, which study.py writes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from minilm_tasks import EvalSet, Hits, MiniLm, read_deltas

__all__ = ["Scores", "paired_difference", "score"]

RESULTS_FILE = Path(__file__).resolve().parent / "results.json"
BASE = "base"


@dataclass(frozen=True)
class Scores:
    """Accuracies between 0 and 1.

    Attributes:
        tasks: accuracy on each task.
        seen: mean over the tasks that an expert was trained for.
        seen_stderr: its standard error.
        unseen: mean over the other tasks.
        unseen_stderr: its standard error.
        share_of_experts: mean over seen tasks of accuracy / accuracy of the task's own expert; None without experts.
    """

    tasks: dict[str, float]
    seen: float
    seen_stderr: float
    unseen: float
    unseen_stderr: float
    share_of_experts: float | None


def score(hits: Hits, seen: Sequence[str], experts: Mapping[str, float]) -> Scores:
    """The summary of one model's answers.

    Args:
        hits: what the model got right.
        seen: the tasks that the model's inputs were trained for; the others count as unseen.
        experts: accuracy of each seen task's own expert; may be empty.
    """
    accuracy = {task: hit.mean().item() for task, hit in hits.items()}
    unseen = [task for task in hits if task not in seen]
    shares = [accuracy[task] / experts[task] for task in seen if task in experts]
    return Scores(
        tasks=accuracy,
        seen=_mean([accuracy[task] for task in seen]),
        seen_stderr=_mean_stderr([hits[task] for task in seen]),
        unseen=_mean([accuracy[task] for task in unseen]),
        unseen_stderr=_mean_stderr([hits[task] for task in unseen]),
        share_of_experts=_mean(shares) if shares else None,
    )


def paired_difference(hits: Hits, others: Hits, tasks: Sequence[str]) -> tuple[float, float]:
    """Mean over tasks of accuracy(hits) − accuracy(others), and its standard error from the example-wise pairs."""
    differences = [hits[task] - others[task] for task in tasks]
    return _mean([d.mean().item() for d in differences]), _mean_stderr(differences)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_stderr(samples: Sequence[torch.Tensor]) -> float:
    """Standard error of the mean of the samples' means."""
    return math.sqrt(sum(s.var(unbiased=False).item() / len(s) for s in samples)) / len(samples)


def known_experts() -> dict[str, float]:
    """The experts' accuracies on their own tasks, as the study measured them; empty before its first run."""
    if not RESULTS_FILE.exists():
        return {}
    found: dict[str, float] = json.loads(RESULTS_FILE.read_text(encoding="utf-8"))["experts"]
    return found


def main() -> None:
    """Evaluate the adapters named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=f"a directory, or '{BASE}'")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    evaluation, encoder = EvalSet(), MiniLm(getattr(torch, options.dtype))
    experts = known_experts() if options.split == "test" else {}
    found = {}
    for name in options.adapters:
        model = encoder.with_deltas({} if name == BASE else read_deltas(Path(name)))
        found[name] = asdict(score(evaluation.hits(model, options.split), evaluation.tasks("seen"), experts))
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
