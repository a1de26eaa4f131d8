"""``tasks.yaml``: what a model is judged by, who judges it, and where the score stands in what the judge writes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from mergekit_lowrank.errors import RecipeError, nearest_name, raise_together
from mergekit_lowrank.recipe.document import Document, read_yaml
from mergekit_lowrank.recipe.origin import Origin, shown
from mergekit_lowrank.recipe.problems import WORDING
from mergekit_lowrank.recipe.strict import Strict, expected, refused, told_as
from mergekit_lowrank.recipe.values import Text

__all__ = ["PLACEHOLDERS", "Find", "Task", "Tasks", "filled", "load_tasks"]

PLACEHOLDERS = ("adapter", "base", "output", "task")
PLACEHOLDER = re.compile(r"\{(?P<literal>\{\w+\})\}|\{(?P<name>\w+)\}")
"""``{name}``; ``{{name}}`` stands for the text ``{name}``. Other braces, as those of JSON, are text."""
MAX_BYTES = 1 << 20
"""Size of the largest tasks file that is read."""
ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Step: TypeAlias = str | int


class _Or:
    """In the JSON Schema, shorter spellings that stand for the value too."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [*({"type": kind} for kind in self._kinds), handler(schema)]}


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with the value of each placeholder in its place."""
    return PLACEHOLDER.sub(lambda found: found["literal"] or values[found["name"]], text)


def named_in(words: Iterable[str]) -> list[str]:
    """The placeholders in ``words``, in their order."""
    return [found["name"] for word in words for found in PLACEHOLDER.finditer(word) if found["name"]]


def _check_placeholders(words: tuple[str, ...]) -> tuple[str, ...]:
    for name in named_in(words):
        if name not in PLACEHOLDERS:
            nearest = nearest_name(name, PLACEHOLDERS)
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            advice = f"did you mean {{{nearest}}}?" if nearest else f"the placeholders are {known}"
            raise refused(f"unknown placeholder {{{name}}}; {advice} ({{{{{name}}}}} stands for the text {{{name}}})")
    return words


def _words(value: Any) -> Any:
    """A command line as the list of its words, split as a shell would; nothing else of a shell is done."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise refused(f"cannot be split into words: {error}; {shown(value)}") from None


def _check_entry_point(value: str) -> str:
    if not ENTRY_POINT.fullmatch(value):
        raise expected("a function as 'module:function'")
    return value


def _steps(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(value.split("."))
    return tuple(value) if isinstance(value, list) else value


def _check_pattern(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise refused(f"not a regular expression: {error}") from None
    if groups != 1:
        raise refused(f"has {groups} groups; the one group of the expression, in (), holds the number")
    return value


def _check_glob(value: str) -> str:
    if Path(value).is_absolute():
        raise expected("a glob below {output}, such as 'results_*.json'")
    return value


Command: TypeAlias = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    told_as("a command line, or a list of its words"),
    AfterValidator(_check_placeholders),
    BeforeValidator(_words),
    _Or("string"),
]
Steps: TypeAlias = Annotated[
    tuple[Text | int, ...],
    told_as("the keys that lead to a value, as 'results.arc.acc' or as a list"),
    BeforeValidator(_steps),
    _Or("string"),
]


class Find(Strict):
    """Where a number, or a list of them, stands in what a command has written."""

    path: Steps | None = Field(
        default=None,
        description="Keys that lead to it in JSON: `results.arc.acc`, or a list where a key has a dot. Of a `.jsonl` "
        "file, in each of its lines.",
    )
    pattern: Annotated[Text, AfterValidator(_check_pattern)] | None = Field(
        default=None, description="A regular expression whose one group is the number; the last match in the text."
    )
    file: Annotated[Text, AfterValidator(_check_glob)] | None = Field(
        default=None,
        description="A glob below `{output}`, which one file matches. When left out: the JSON file there that holds "
        "the path; without `{output}` what was printed.",
    )

    @model_validator(mode="after")
    def _is_one_way(self) -> Find:
        if (self.path is None) == (self.pattern is None):
            raise refused("expected either a path or a pattern")
        return self


def _as_find(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list) else value


Where: TypeAlias = Annotated[Find, BeforeValidator(_as_find), _Or("string", "array")]


class Task(Strict):
    """One thing that models are judged by, and the evaluator that does it."""

    expert: Text | None = Field(
        default=None,
        description="The label of the recipe's model that was trained for it. A task without one is unseen: it says "
        "what the merge does elsewhere.",
    )
    command: Command | None = Field(
        default=None,
        description="The evaluator, with `{adapter}`, `{base}`, `{task}` and, where it writes a file or directory, "
        "`{output}`. It is split into words as a shell would, but no shell runs it.",
    )
    base_command: Command | None = Field(
        default=None,
        description="The same for the base alone, without `{adapter}`. When left out, the base is not evaluated.",
    )
    python: Annotated[Text, AfterValidator(_check_entry_point)] | None = Field(
        default=None,
        description="In place of a command: `module:function`, found beside the tasks file or installed. It is called "
        "as `function(adapter, base, **arguments)`, with None as the adapter for the base, and returns a score, the "
        "outcome of each example, or an `Outcome`.",
    )
    arguments: dict[str, Any] = Field(
        default={}, description="Of the function; `{task}` and `{base}` are filled into text."
    )
    score: Where | None = Field(
        default=None, description="Where a command's score stands, higher being better; with `examples` their mean."
    )
    examples: Where | None = Field(
        default=None,
        description="Where the outcomes of the examples stand: a list of 0 and 1, true and false, or scores. The "
        "same examples in the same order for every model.",
    )
    stderr: Where | None = Field(default=None, description="Where the standard error of a score without examples is.")
    count: Annotated[int, Field(ge=1)] | Where | None = Field(
        default=None,
        union_mode="left_to_right",
        description="How many examples a share of right answers is of, or where that stands.",
    )

    @model_validator(mode="after")
    def _has_one_evaluator(self) -> Task:
        if (self.command is None) == (self.python is None):
            raise refused("expected one evaluator: a command, or a Python function under 'python'")
        for key in ("base_command", "score", "examples", "stderr", "count") if self.python else ("arguments",):
            if key in self.model_fields_set:
                raise refused(f"goes with a {'command' if self.python else 'Python function'}", at=(key,))
        if self.command is not None:
            self._check_command(self.command)
        return self

    def _check_command(self, command: tuple[str, ...]) -> None:
        if "adapter" not in named_in(command):
            raise refused("does not hold {adapter}, so every adapter would get the same score", at=("command",))
        if self.base_command is not None and "adapter" in named_in(self.base_command):
            raise refused("holds {adapter}, and there is none of the base alone", at=("base_command",))
        if self.score is None and self.examples is None:
            raise refused("where does the score stand in what it writes? Add score or examples", at=("command",))
        if any(isinstance(f, Find) and f.file for f in self.finds) and "output" not in named_in(command):
            raise refused("does not hold {output}, below which a file is looked for", at=("command",))

    @property
    def finds(self) -> tuple[Find | int | None, ...]:
        """Where the score and what belongs to it stand."""
        return self.score, self.examples, self.stderr, self.count


class Tasks(Strict):
    """A tasks file."""

    tasks: dict[Text, Task] = Field(min_length=1, description="Each task by its name.")
    base: Text | None = Field(
        default=None,
        description="What `{base}` stands for: a path, relative to this file, or a Hugging Face id. [the recipe's "
        "`base_model`, else what the adapters name]",
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Seconds that a command may take. [no limit]"
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def directory(self) -> Path:
        """Where commands run, where functions are looked for, and what the path of the base starts from."""
        return self._origin.directory

    def problem(self, loc: tuple[Step, ...], message: str) -> RecipeError:
        """An error about the value at ``loc``, to be raised or collected."""
        return RecipeError(f"{self._origin.prefix(loc)}: {message}")


def load_tasks(source: Tasks | Mapping[str, Any] | str | PathLike[str]) -> Tasks:
    """The tasks in a YAML file, or in the same as a mapping.

    Raises:
        RecipeError: every problem, each with its line.
    """
    if isinstance(source, Tasks):
        return source
    if isinstance(source, Mapping):
        return _checked(Document(dict(source), {}), "tasks", Path.cwd())
    path = Path(source)
    document = read_yaml(_text(path), locate=lambda line, column: f"{path}:{line + 1}:{column + 1}")
    return _checked(document, str(path), path.absolute().parent)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; name a file of tasks") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes, the most that is read as a file of tasks")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from None


def _checked(document: Document, name: str, directory: Path) -> Tasks:
    origin = Origin(name, directory, document.places)
    if not isinstance(document.data, dict):
        raise RecipeError(f"{origin.where(())}: expected a mapping with the key 'tasks', found {shown(document.data)}")
    try:
        tasks = Tasks.model_validate(document.data)
    except ValidationError as error:
        raise_together(list(_problems(error, origin)))
        raise  # cannot happen: a validation error holds at least one problem
    tasks._origin = origin
    return tasks


def _problems(error: ValidationError, origin: Origin) -> Iterator[RecipeError]:
    for details in error.errors(include_url=False):
        if details["type"] == "too_short" and details["input"]:
            continue  # pydantic counts valid entries only, and the invalid ones are reported by themselves
        yield RecipeError(_sentence(details, origin))


def _sentence(details: ErrorDetails, origin: Origin) -> str:
    kind, context = details["type"], details.get("ctx", {})
    loc = (*details["loc"], *context.get("at", ()))
    prefix = origin.prefix(loc, key=kind == "extra_forbidden")
    if kind == "extra_forbidden":
        return f"{prefix}: unknown key {shown(loc[-1])}; {_advice(loc)}"
    if kind == "missing":
        return f"{prefix}: missing key {shown(loc[-1])}"
    if kind == "refused":
        return f"{prefix}: {context['why']}"
    what = context.get("what") or WORDING.get(kind)
    found = shown(details["input"])
    return f"{prefix}: expected {what}, found {found}" if what else f"{prefix}: {details['msg']}, found {found}"


def _advice(loc: tuple[Step, ...]) -> str:
    """What to write in place of the unknown key at the end of ``loc``."""
    part = (Tasks, Tasks, Task, Find)[min(len(loc), 4) - 1] if len(loc) != 2 else Tasks
    nearest = nearest_name(str(loc[-1]), part.model_fields)
    return f"did you mean {nearest!r}?" if nearest else f"the keys here are {', '.join(part.model_fields)}"
