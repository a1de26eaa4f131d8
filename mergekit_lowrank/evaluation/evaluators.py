"""Running what judges a model: a command of another program, or a Python function."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergekit_lowrank.errors import EvaluationError, MergeError, raise_together
from mergekit_lowrank.evaluation.outcomes import Outcome, as_outcome
from mergekit_lowrank.evaluation.tasks import Find, Task, Tasks, filled
from mergekit_lowrank.recipe.origin import shown

__all__ = ["Evaluators", "evaluators_of"]

LAST_LINES = 8
"""Of what a command that failed has said."""
SHOWN_FILES = 5
OUTPUT = "output"
"""What ``{output}`` is called, in a directory of its own for each run."""


@dataclass
class Evaluators:
    """The evaluators of a tasks file, ready to run.

    Attributes:
        tasks: the file.
        base: what ``{base}`` stands for.
        timeout: seconds that a command may take; None for no limit.
        scratch: holds what commands write.
        functions: the Python functions, by ``module:function``.
    """

    tasks: Tasks
    base: str
    timeout: float | None
    scratch: Path
    functions: Mapping[str, Callable[..., Any]]
    _written: dict[tuple[str, ...], Written] = field(default_factory=dict)

    def can_judge(self, name: str, adapter: Path | None) -> bool:
        """Whether the task can be run on this adapter, or on the base, which some commands cannot."""
        task = self.tasks.tasks[name]
        return adapter is not None or task.python is not None or task.base_command is not None

    def outcome(self, name: str, adapter: Path | None) -> Outcome:
        """The outcome of a task with an adapter, or with the base alone.

        Raises:
            EvaluationError: the evaluator failed, or what it wrote holds no score.
        """
        task = self.tasks.tasks[name]
        try:
            return self._called(name, task, adapter) if task.python else self._run(name, task, adapter)
        except (TypeError, ValueError) as error:  # of what was found: it is no number, or contradicts itself
            raise EvaluationError(f"task '{name}', {_called(adapter)}: {_reason(error)}") from error

    def _called(self, name: str, task: Task, adapter: Path | None) -> Outcome:
        values = {"task": name, "base": self.base}
        arguments = {key: filled(v, values) if isinstance(v, str) else v for key, v in task.arguments.items()}
        try:
            found = self.functions[str(task.python)](adapter, self.base, **arguments)
        except MergeError:
            raise
        except Exception as error:
            raise EvaluationError(
                f"task '{name}', {_called(adapter)}: {task.python} raised {type(error).__name__}: {error} "
                f"({_place(error)})"
            ) from error
        return as_outcome(found)

    def _run(self, name: str, task: Task, adapter: Path | None) -> Outcome:
        template = task.base_command if adapter is None else task.command
        written = self._once(name, template or (), adapter)

        def found(where: Find | int | None) -> Any:
            return written.found(where) if isinstance(where, Find) else where

        examples, score = found(task.examples), found(task.score)
        if not isinstance(examples, list | None):
            raise TypeError(f"examples: expected a list of outcomes, found {shown(examples)}")
        outcome = as_outcome(score if examples is None else examples).model_dump()
        own = {"score": score, "stderr": found(task.stderr), "count": found(task.count)}
        return Outcome.model_validate(outcome | {key: value for key, value in own.items() if value is not None})

    def _once(self, name: str, template: Sequence[str], adapter: Path | None) -> Written:
        """What a command wrote; one that several tasks share runs once."""
        values = {"task": name, "base": self.base, "adapter": str(adapter)}
        key = tuple(filled(word, values | {"output": "{output}"}) for word in template)
        if key not in self._written:
            output = Path(tempfile.mkdtemp(dir=self.scratch)) / OUTPUT
            command = [filled(word, values | {"output": str(output)}) for word in template]
            printed = _printed(command, self.tasks.directory, self.timeout, f"task '{name}', {_called(adapter)}")
            self._written[key] = Written(shlex.join(command), printed, output)
        return self._written[key]


@dataclass(frozen=True)
class Written:
    """What one command wrote.

    Attributes:
        command: as it was run.
        printed: its standard output.
        output: the file or directory that ``{output}`` stood for.
    """

    command: str
    printed: str
    output: Path

    def found(self, where: Find) -> Any:
        """The number, or the list, that stands there.

        Raises:
            ValueError: it is not there.
        """
        texts = self._texts(where)
        holding = {name: found for name, text in texts.items() if (found := _values(where, name, text))}
        if len(holding) == 1:
            ((name, values),) = holding.items()
            return values if name.endswith(".jsonl") else values[-1]
        what = f"the pattern {shown(where.pattern)}" if where.pattern else f"'{'.'.join(map(str, where.path or ()))}'"
        names = ", ".join([*(holding or texts)][:SHOWN_FILES]) or "nothing, for no such file was written"
        where_not = "stands in several files" if holding else "is not in what the evaluator wrote"
        advice = "name one under 'file'" if holding else "look at what it writes"
        raise ValueError(f"{what} {where_not}: {names}; {advice} (command: {self.command})")

    def _texts(self, where: Find) -> dict[str, str]:
        """What may hold it, by name."""
        if where.file is None and not self.output.exists():
            return {"its standard output": self.printed}
        files = [self.output] if self.output.is_file() else sorted(self.output.rglob(where.file or "*.json"))
        return {path.name: path.read_text(encoding="utf-8") for path in files if path.is_file()}


def _values(where: Find, name: str, text: str) -> list[Any]:
    """Every value that ``where`` leads to in a text; of a line each in ``.jsonl``."""
    if where.pattern is not None:
        return [float(match) for match in re.findall(where.pattern, text)]
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    try:
        return [_at(json.loads(line), where.path or ()) for line in lines]
    except (ValueError, LookupError, TypeError):
        return []  # not JSON, or another one


def _at(data: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def _printed(command: Sequence[str], directory: Path, timeout: float | None, what: str) -> str:
    """The standard output of a command that ended well. Where it is cut off, all that it started ends with it.

    Raises:
        EvaluationError: it did not, or took too long.
    """
    line = f"command: {shlex.join(command)}"
    with _started(command, directory, what) as process:
        try:
            printed, said = process.communicate(timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise EvaluationError(f"{what}: took longer than {timeout:g} s ({line}); raise the timeout") from error
            raise
    if process.returncode:
        status = _status(process.returncode)
        raise EvaluationError(f"{what}: the evaluator ended with {status} ({line}){_last_lines(said or printed)}")
    return printed.decode("utf-8", "replace")


def _started(command: Sequence[str], directory: Path, what: str) -> subprocess.Popen[bytes]:
    """A process in a group of its own."""
    try:
        return subprocess.Popen(  # noqa: S603 - the tasks file is the user's, like a Makefile
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise EvaluationError(
            f"{what}: the evaluator cannot be started: {error.strerror} (command: {shlex.join(command)})"
        ) from error


def _status(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"signal {-code}"


def _last_lines(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").rstrip().splitlines()[-LAST_LINES:]
    return "".join(f"\n  | {line}" for line in lines)


def _called(adapter: Path | None) -> str:
    return "the base" if adapter is None else f"adapter {adapter}"


def _reason(error: Exception) -> str:
    """What is wrong with an outcome, without pydantic's frame."""
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


def _place(error: BaseException) -> str:
    """File and line of where an error arose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


@contextmanager
def evaluators_of(tasks: Tasks, base: str, timeout: float | None) -> Iterator[Evaluators]:
    """The evaluators, once all of them are known to be there. What they write is gone at the end.

    Raises:
        RecipeError: programs or functions that are missing.
    """
    with _first_on_path(tasks.directory), tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        functions = _functions(tasks)
        yield Evaluators(tasks, base, timeout or tasks.timeout, Path(scratch), functions)


def _functions(tasks: Tasks) -> dict[str, Callable[..., Any]]:
    """The functions of the file, by their names; problems of functions and programs together."""
    functions, problems = dict[str, Callable[..., Any]](), list[MergeError]()
    for name, task in tasks.tasks.items():
        try:
            if task.python is not None:
                functions[task.python] = functions.get(task.python) or _function(task.python)
            for command in filter(None, (task.command, task.base_command)):
                _check_program(command[0], tasks.directory)
        except Exception as error:  # noqa: PERF203 - every task's problem is wanted; importing runs foreign code
            key = "python" if task.python else "command"
            problems.append(tasks.problem(("tasks", name, key), str(error)))
    raise_together(problems)
    return functions


def _function(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ImportError(f"{entry} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise TypeError(f"{entry} is not a function, but {shown(found)}")
    return found  # type: ignore[no-any-return]


def _check_program(program: str, directory: Path) -> None:
    """Programs with a slash start from the directory that commands run in, as the system has it."""
    path = str(directory / program) if "/" in program else program
    if shutil.which(path) is None:
        raise FileNotFoundError(f"there is no program {shown(program)}; install it, or write its path")


@contextmanager
def _first_on_path(directory: Path) -> Iterator[None]:
    """Modules beside the tasks file can be imported."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
