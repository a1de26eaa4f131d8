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

from mergekit_lowrank.errors import EvaluationError, MergeError, nearest_name, raise_together
from mergekit_lowrank.evaluation.outcomes import Outcome, as_outcome
from mergekit_lowrank.evaluation.tasks import Find, Task, Tasks, filled
from mergekit_lowrank.recipe.origin import shown

__all__ = ["Evaluators", "evaluators_of"]

LAST_LINES = 8
"""Of what a command that failed has said."""
SHOWN_FILES = 5
SHOWN_KEYS = 20
OUTPUT = "output"
"""What ``{output}`` is called, in a directory of its own for each run."""
PRINTED, SAID = "stdout", "stderr"
"""Beside it. An evaluator may print more than memory holds."""
TAIL_BYTES = 1 << 14


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
        except (TypeError, ValueError, OverflowError) as error:  # of what was found
            raise EvaluationError(f"task '{name}', {_called(adapter)}: {_reason(error)}") from error

    def _called(self, name: str, task: Task, adapter: Path | None) -> Outcome:
        values = {"task": name, "base": self.base}
        arguments = {key: filled(v, values) if isinstance(v, str) else v for key, v in task.arguments.items()}
        try:
            found = self.functions[str(task.python)](adapter, self.base, **arguments)
        except MergeError:
            raise
        except (Exception, SystemExit) as error:  # a status of 0 would read as success
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
            own = Path(tempfile.mkdtemp(dir=self.scratch))
            command = [filled(word, values | {"output": str(own / OUTPUT)}) for word in template]
            said = own / PRINTED, own / SAID
            _execute(command, self.tasks.directory, said, self.timeout, f"task '{name}', {_called(adapter)}")
            self._written[key] = Written(shlex.join(command), own / PRINTED, own / OUTPUT)
        return self._written[key]


@dataclass(frozen=True)
class Written:
    """What one command wrote.

    Attributes:
        command: as it was run.
        printed: the file of its standard output.
        output: the file or directory that ``{output}`` stood for.
    """

    command: str
    printed: Path
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
        advice = "name one under 'file'" if holding else _keys_instead(where, texts) or "look at what it writes"
        raise ValueError(f"{what} {where_not}: {names}; {advice} (command: {self.command})")

    def _texts(self, where: Find) -> dict[str, str]:
        """What may hold it, by name."""
        if where.file is None and not self.output.exists():
            return {"its standard output": self.printed.read_text(encoding="utf-8", errors="replace")}
        if self.output.is_file():
            return {self.output.name: self.output.read_text(encoding="utf-8")}
        files = sorted(path for path in self.output.rglob(where.file or "*.json") if path.is_file())
        return {path.relative_to(self.output).as_posix(): path.read_text(encoding="utf-8") for path in files}


def _values(where: Find, name: str, text: str) -> list[Any]:
    """Every value that ``where`` leads to in a text; of a line each in ``.jsonl``."""
    if where.pattern is not None:
        return [float(match) for match in re.findall(where.pattern, text)]
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    try:
        return [_at(json.loads(line), where.path or ()) for line in lines]
    except (ValueError, LookupError, TypeError):
        return []  # not JSON, or another one


def _keys_instead(where: Find, texts: Mapping[str, str]) -> str:
    """Which keys stand where one of the path is missing, in the first text that has its place."""
    for name, text in texts.items():
        with suppress(ValueError, LookupError, TypeError):
            data = json.loads(text.partition("\n")[0] if name.endswith(".jsonl") else text)
            if found := _keys_beside(data, where.path or ()):
                return found
    return ""


def _keys_beside(data: Any, steps: Sequence[str | int]) -> str:
    for place, step in enumerate(steps):
        held = _at(data, steps[:place])
        if isinstance(held, Mapping) and step not in held:
            where = f"'{'.'.join(map(str, steps[:place]))}' has" if place else "the top level has"
            listed = ", ".join([*held][:SHOWN_KEYS]) + ", …" * (len(held) > SHOWN_KEYS)
            nearest = nearest_name(str(step), held)
            return f"{where} the keys {listed}" + (f"; did you mean {nearest!r}?" if nearest else "")
    return ""


def _at(data: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def _execute(
    command: Sequence[str], directory: Path, files: tuple[Path, Path], timeout: float | None, what: str
) -> None:
    """Run a command to a good end. Where it is cut off, all that it started ends with it.

    Args:
        command: its words.
        directory: to run it in.
        files: that take its standard output and its standard error.
        timeout: seconds that it may take.
        what: it is run for.

    Raises:
        EvaluationError: it did not end well, or took too long.
    """
    line = f"command: {shlex.join(command)}"
    with _started(command, directory, files, what) as process:
        try:
            process.wait(timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise EvaluationError(f"{what}: took longer than {timeout:g} s ({line}); raise the timeout") from error
            raise
    if process.returncode:
        status = _status(process.returncode)
        printed, said = map(_tail, files)
        raise EvaluationError(f"{what}: the evaluator ended with {status} ({line}){_last_lines(said or printed)}")


def _started(command: Sequence[str], directory: Path, files: tuple[Path, Path], what: str) -> subprocess.Popen[bytes]:
    """A process in a group of its own."""
    try:
        with files[0].open("wb") as printed, files[1].open("wb") as said:
            return subprocess.Popen(  # noqa: S603 - the tasks file is the user's, like a Makefile
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=said,
                start_new_session=True,
            )
    except OSError as error:
        raise EvaluationError(
            f"{what}: the evaluator cannot be started: {error.strerror} (command: {shlex.join(command)})"
        ) from error


def _status(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"signal {-code}"


def _tail(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return opened.read()


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
        except Exception as error:  # noqa: PERF203 - every task's problem is wanted
            key = "python" if task.python else "command"
            problems.append(tasks.problem(("tasks", name, key), str(error)))
    raise_together(problems)
    return functions


def _function(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # of foreign code
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
