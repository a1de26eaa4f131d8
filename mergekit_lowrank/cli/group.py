"""The command group: options that every command takes, and the exit status that each kind of error gives."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_lowrank.errors import MergeError

if TYPE_CHECKING:
    from mergekit_lowrank.cli.logs import JsonLog
    from mergekit_lowrank.events import Reporter

__all__ = ["INTERRUPTED", "TERMINATED", "CommandLine", "Stopped", "Verbosity", "log_option", "verbosity_options"]

BUG = 1
FAULT = 2
"""The input's, the recipe's or the disk's."""
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
TERMINATED = 143
"""128 + SIGTERM."""

SHOWN_PROBLEMS = 20
"""Of one error; more of them have a common cause."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass
class Verbosity:
    """How much is said beside what was asked for.

    Attributes:
        quiet: no progress and no closing lines; warnings stay.
        debug: tracebacks with errors.
        log: where events go as JSON; None for nowhere.
    """

    quiet: bool = False
    debug: bool = False
    log: JsonLog | None = None

    @property
    def logs_to_stderr(self) -> bool:
        """Whether stderr is for JSON alone."""
        return self.log is not None and self.log.is_stderr

    def reporters(self) -> list[Reporter]:
        """Who follows the work of the command: a progress bar, a log, both, or nobody."""
        from mergekit_lowrank.progress import ProgressBar  # loads tqdm

        log: list[Reporter] = [] if self.log is None else [self.log]
        return log if self.quiet or self.logs_to_stderr else [ProgressBar(), *log]

    def warn(self, message: str) -> None:
        """A line on stderr, unless the log has it from an event."""
        if not self.logs_to_stderr:
            click.echo(f"warning: {message}", err=True)

    def end(self, status: int, error: BaseException | None = None, message: str = "") -> None:
        """Say how the command ended.

        Args:
            status: its exit status.
            error: why it failed; its traceback is shown where tracebacks are.
            message: about the error.
        """
        trace = "".join(traceback.format_exception(error)) if error is not None and self.debug else ""
        if self.log is not None:
            self.log.end(status, message, trace)
        if message and not self.logs_to_stderr:
            click.echo(f"{trace}{message}", err=True)


class Stopped(KeyboardInterrupt):
    """A command was told to end; its text is what is said about it.

    Attributes:
        status: the exit status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def verbosity_options(command: Decorated) -> Decorated:
    """``--quiet`` and ``--debug``, kept in the context's ``Verbosity``."""
    quiet = click.option(
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="No progress and no closing lines; warnings stay.",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember,
        help="Show the traceback of an error.",
    )
    return quiet(debug(command))


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        setattr(ctx.ensure_object(Verbosity), str(param.name), True)


def log_option(command: Decorated) -> Decorated:
    """``--log-json``, kept in the context's ``Verbosity`` as an open file."""
    return click.option(
        "--log-json",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_open_log,
        help="Append every event to FILE, a line of JSON each; - for stderr, which then holds nothing else.",
    )(command)


def _open_log(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    from mergekit_lowrank.cli.logs import open_log

    try:
        ctx.ensure_object(Verbosity).log = open_log(value)
    except OSError as error:
        raise click.BadParameter(f"{value} cannot be written: {error.strerror or error}", ctx, param) from error


class CommandLine(click.Group):
    """A group whose errors are one readable text on stderr, and whose exit status says whose fault it was."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit: 0; 2 a fault of input, recipe or disk; 1 a bug; 130 or 143 stopped."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
        verbosity = Verbosity()
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, obj=verbosity, **extra)
            verbosity.end(status or 0)
        except (Exception, KeyboardInterrupt) as error:
            status, message = _explained(error)
            verbosity.end(status, error, message)
        if not _flushes_stdout():
            _discard_stdout()
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. It ends quietly when nobody reads its output any more, as in ``… | head``."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if not ctx.ensure_object(Verbosity).logs_to_stderr:
                raise
            raise click.Abort from error  # of another kind click would say an empty line
        except BrokenPipeError as error:
            if _flushes_stdout(more="\n"):  # then it was another pipe, and click would hide that
                raise ConnectionError(f"a connection was closed: {error}") from error
            raise click.exceptions.Exit(0) from error


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and what is said about it."""
    match error:
        case click.Abort(__cause__=Stopped() as stopped):
            return stopped.status, str(stopped)
        case click.Abort() | KeyboardInterrupt():
            return INTERRUPTED, "interrupted: nothing was written"
        case click.ClickException():
            return FAULT, f"{_usage(error)}error: {error.format_message()}"
        case MergeError():
            return FAULT, f"error: {_shortened(error)}"
        case OSError() if error.filename and error.strerror:
            return FAULT, f"error: {error.filename}: {error.strerror}"
        case OSError():
            return FAULT, f"error: {error}"
    if _is_out_of_memory(error):
        return FAULT, (
            f"error: out of memory ({str(error) or 'no more could be had'}). Let the merge hold less with --memory, "
            "choose a space without dense deltas (joint, core, factors), or close other programs."
        )
    return BUG, (
        f"error: this is a bug in mergekit-lowrank: {type(error).__name__}: {error}\n"
        "Please report it, with what --debug shows."
    )


def _shortened(error: MergeError) -> str:
    """The error's text; of very many problems the first ones and the count of the others."""
    problems = error.problems
    if len(problems) <= SHOWN_PROBLEMS:
        return str(error)
    listing = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems[:SHOWN_PROBLEMS], 1))
    return f"{len(problems)} problems:\n{listing}\n... and {len(problems) - SHOWN_PROBLEMS} more"


def _usage(error: click.ClickException) -> str:
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return ""
    return f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help'.\n\n"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a GPU had no more memory; torch has kinds of its own, and it may not be imported here."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _flushes_stdout(more: str = "") -> bool:
    try:
        if sys.stdout is not None:
            sys.stdout.write(more)
            sys.stdout.flush()
    except OSError:
        return False
    return True


def _discard_stdout() -> None:
    """Drop what nobody reads; Python would complain about it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
