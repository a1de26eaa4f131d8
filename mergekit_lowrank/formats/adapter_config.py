"""``adapter_config.json`` of any kind of adapter: each field is honoured, without effect, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mergekit_lowrank.errors import CheckpointError, nearest_name, raise_together
from mergekit_lowrank.filenames import ADAPTER_CONFIG

__all__ = [
    "AdapterConfig",
    "Names",
    "Pattern",
    "Rank",
    "first_match",
    "is_named",
    "is_unset",
    "short",
]

_Own = TypeVar("_Own", bound="AdapterConfig")
_Value = TypeVar("_Value")

_PATTERNS_KEPT = 4096


def _compilable(pattern: str) -> str:
    if _repeats_repeated(pattern):
        raise ValueError("the key repeats what repeats, as (a+)+ does, which may take for ever to match")
    try:
        compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the key is not a valid regular expression ({error})") from error
    return pattern


def _repeats_repeated(pattern: str) -> bool:
    """Whether a group with a repetition in it is repeated: matching may take time exponential in a name's length."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)
    while match := re.search(r"\(([^()]*)\)([+*{]?)", plain):
        inner, outer = re.search(r"[+*{]", match[1]) is not None, bool(match[2])
        if inner and outer:
            return True
        plain = plain[: match.start()] + ("x+" if inner else "x") + plain[match.end(1) + 1 :]
    return False


@lru_cache(_PATTERNS_KEPT)
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression against which peft matches module names (``peft.utils.other.get_pattern_key``)."""
    return re.compile(rf"(.*\.)?({pattern})$")


Pattern = Annotated[str, AfterValidator(_compilable)]
"""A key of ``rank_pattern`` or ``alpha_pattern``."""
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Rank = Annotated[int, Field(gt=0, lt=1 << 31)]  # any larger one is no rank, and may not even divide a float


class AdapterConfig(BaseModel):
    """What a configuration says about merging.

    Attributes:
        ignored: fields without effect on a merge.
        refused: why a field that is set is not handled, and what to do.
        raw: the configuration as stored.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_mapping",
            "inference_mode",
            "peft_version",
            "runtime_config",
            # Which modules were trained: the tensors themselves say so.
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {}

    modules_to_save: Names = ()
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    raw: dict[str, object]

    @classmethod
    def parse(cls: type[_Own], raw: Mapping[str, object], *, where: str) -> _Own:
        """The configuration, checked.

        Raises:
            CheckpointError: all fields that are wrong, unknown, or not handled.
        """
        problems = [
            CheckpointError(f"{where}: {problem}") for name, value in raw.items() for problem in cls._judge(name, value)
        ]
        given = {name: value for name, value in raw.items() if value is not None}
        try:
            config = cls.model_validate({**given, "raw": dict(raw)})
        except ValidationError as error:
            problems += [CheckpointError(f"{where}: {problem}") for problem in _invalid_fields(error)]
        raise_together(problems)
        return config

    def saved_under(self, module: str) -> str | None:
        """What ``modules_to_save`` calls a module that holds a tensor, or one above it; None where it does not."""
        parts = module.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return next((name for name in self.modules_to_save if any(is_named(name, path) for path in above)), None)

    @classmethod
    def _judge(cls, name: str, value: object) -> Iterator[str]:
        """A message for a field that is set and neither honoured nor without effect."""
        known = {*cls.model_fields, *cls.ignored, *cls.refused, "peft_type"} - {"raw"}
        if is_unset(value):
            return
        if name in cls.refused:
            yield f"'{name}' is set to {short(value)}, which is not handled: {cls.refused[name]}"
        elif name not in known:
            guess = nearest_name(name, known)
            yield (
                f"unknown field '{name}' is set to {short(value)}"
                + (f"; did you mean '{guess}'? " if guess else ". ")
                + "Remove it if it does not change what the adapter computes."
            )


def first_match(patterns: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """The value of the first pattern that matches a module's name, as peft has it."""
    return next((value for pattern, value in patterns.items() if compiled(pattern).match(module)), default)


def is_named(target: str, module: str) -> bool:
    """Whether ``target`` is a module's name or the last parts of it, as peft matches its lists of names."""
    return module == target or module.endswith(f".{target}")


def is_unset(value: object) -> bool:
    """Whether a field says no more than if it were missing."""
    return value is None or value is False or (isinstance(value, str | list | dict | tuple) and not value)


def short(value: object, limit: int = 60) -> str:
    """A value as errors quote it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _invalid_fields(error: ValidationError) -> Iterator[str]:
    """A message for each field whose value is of the wrong type or out of range."""
    for problem in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "missing":
            yield f"'{field}' is missing. Every configuration of this kind has it: download {ADAPTER_CONFIG} again."
        elif field == "peft_type":
            yield f"'peft_type' is {short(problem['input'])}; expected LORA, ADALORA, LOHA, LOKR or VERA."
        else:
            reason = problem["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            yield f"'{field}' is {short(problem['input'])}: {reason}."
