"""``adapter_config.json`` of PEFT's other kinds: each field is honoured, without effect, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)

from mergekit_lowrank.errors import CheckpointError, nearest_name, raise_together
from mergekit_lowrank.formats.peft_config import CONFIG_NAME

__all__ = ["LycorisConfig", "Rank", "VariantConfig"]

_Own = TypeVar("_Own", bound="VariantConfig")
_Value = TypeVar("_Value")


def _compilable(pattern: str) -> str:
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the key is not a valid regular expression ({error})") from error
    return pattern


def _compiled(pattern: str) -> re.Pattern[str]:
    """The expression against which peft matches module names (``peft.utils.other.get_pattern_key``)."""
    return re.compile(rf"(.*\.)?({pattern})$")


_Regex = Annotated[str, AfterValidator(_compilable)]
_Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


Rank = Annotated[int, Field(gt=0, lt=1 << 31)]  # any larger one is no rank, and may not even divide a float


class VariantConfig(BaseModel):
    """What the configuration of an adapter that is no LoRA says about merging.

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
            "init_weights",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {}

    modules_to_save: _Names = ()
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
        problems = [CheckpointError(f"{where}: {problem}") for problem in cls._unhandled_fields(raw)]
        given = {name: value for name, value in raw.items() if value is not None}
        try:
            config = cls.model_validate({**given, "raw": dict(raw)})
        except ValidationError as error:
            problems += [CheckpointError(f"{where}: {problem}") for problem in _invalid_fields(error)]
        raise_together(problems)
        return config

    def rank_of(self, module: str) -> int:
        """The rank that the configuration claims for a module, as the kind counts it."""
        raise NotImplementedError

    def scaling_of(self, module: str) -> float:
        """What multiplies the product of a module's tensors."""
        raise NotImplementedError

    def saved_under(self, parameter: str) -> str | None:
        """What ``modules_to_save`` calls the module that holds a parameter, or one above it; None where it does not."""
        parts = parameter.split(".")[:-1]
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return next(
            (name for name in self.modules_to_save if any(f".{path}".endswith(f".{name}") for path in above)), None
        )

    @classmethod
    def _unhandled_fields(cls, raw: Mapping[str, object]) -> Iterator[str]:
        """A message for each field that is set and neither honoured nor without effect."""
        known = {*cls.model_fields, *cls.ignored, *cls.refused, "peft_type"} - {"raw"}
        for name, value in raw.items():
            if name in cls.refused and not _is_unset(value):
                yield f"'{name}' is set to {_short(value)}, which is not handled: {cls.refused[name]}"
            elif name not in known and not _is_unset(value):
                guess = nearest_name(name, known)
                yield (
                    f"unknown field '{name}' is set to {_short(value)}"
                    + (f"; did you mean '{guess}'? " if guess else ". ")
                    + "Remove it if it does not change what the adapter computes."
                )


class LycorisConfig(VariantConfig):
    """Of LoHa and LoKr: alpha / r, with patterns as LoRA has them; there is no rsLoRA."""

    ignored: ClassVar[frozenset[str]] = VariantConfig.ignored | {
        "rank_dropout",
        "module_dropout",
        # Whether kernels are stored as Tucker cores: the tensors themselves say so.
        "use_effective_conv2d",
    }

    r: Rank
    alpha: FiniteFloat
    rank_pattern: dict[_Regex, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[_Regex, FiniteFloat] = Field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """By the first pattern that matches."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """Alpha / r, each by the first pattern that matches."""
        return _first_match(self.alpha_pattern, module, self.alpha) / self.rank_of(module)


def _first_match(patterns: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    return next((value for pattern, value in patterns.items() if _compiled(pattern).match(module)), default)


def _invalid_fields(error: ValidationError) -> Iterator[str]:
    """A message for each field whose value is of the wrong type or out of range."""
    for problem in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "missing":
            yield f"'{field}' is missing. Every configuration of this kind has it: download {CONFIG_NAME} again."
        else:
            reason = problem["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            yield f"'{field}' is {_short(problem['input'])}: {reason}."


def _is_unset(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict | tuple) and not value)


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
