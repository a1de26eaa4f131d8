"""The results file: every run as soon as it is done, so that an evaluation which is cut off goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.evaluation.outcomes import Outcome
from mergekit_lowrank.evaluation.results import Evaluation, Run

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Runs by their keys, in a file or in memory.

    Attributes:
        path: the file; None for none.
        begun: the evaluation, still without its tables.
        used: the runs of this evaluation.
        older: those that the file held.
    """

    path: Path | None
    begun: Evaluation
    used: dict[str, Run] = field(default_factory=dict)
    older: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path | None, begun: Evaluation) -> Ledger:
        """The ledger with what its file holds already.

        Raises:
            OutputError: it holds something else, or its directory is missing.
        """
        if path is None:
            return cls(path, begun)
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: there is no directory {path.parent}; make it, or name another file")
        older = Evaluation.read(path).runs if path.exists() else ()
        return cls(path, begun, older={run.key: run for run in older})

    def known(self, key: str) -> Run | None:
        """The run of this key, if it was done."""
        found = self.used.get(key) or self.older.get(key)
        if found is not None:
            self.used[key] = found
        return found

    def add(self, key: str, task: str, model: str, outcome: Outcome, wall_seconds: float) -> None:
        """Note a run, in the file too."""
        self.used[key] = Run(key=key, task=task, model=model, outcome=outcome, wall_seconds=wall_seconds)
        self._write(self.begun.model_copy(update={"runs": tuple({**self.older, **self.used}.values())}))

    def close(self, complete: Evaluation) -> Evaluation:
        """The evaluation with its runs, as the file then holds it."""
        complete = complete.model_copy(update={"runs": tuple(self.used.values())})
        self._write(complete)
        return complete

    def _write(self, evaluation: Evaluation) -> None:
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_text(evaluation.to_json(), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
