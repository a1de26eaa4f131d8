"""``adapter_config.json``, read strictly: each field is honoured, without effect on a merge, or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
)

from mergekit_lowrank.errors import CheckpointError, nearest_name, raise_together
from mergekit_lowrank.filenames import ADAPTER_CONFIG

__all__ = ["CONFIG_NAME", "PeftConfig", "read_raw_config"]

CONFIG_NAME = ADAPTER_CONFIG

_Value = TypeVar("_Value")

_IGNORED = frozenset(
    {
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "runtime_config",
        "lora_dropout",
        # Which modules were trained: the tensors themselves say so.
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
        # Without effect unless a field that is refused below, or a refused init_lora_weights, turns them on.
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
    }
)

_PLAIN = "Train or export it as a plain LoRA."
_FOLD = "Fold it into its base model and extract a plain LoRA from the difference."

_REFUSED: Mapping[str, str] = {
    "layer_replication": "it changes which layers the base has. Train on the replicated model, saved on its own.",
    "megatron_config": "Megatron layers split factors across devices. Convert the adapter to Hugging Face layers.",
    "use_qalora": f"QALoRA pools the input before lora_A, so its update is not lora_B @ lora_A. {_FOLD}",
    "use_bdlora": f"block-diagonal factors are stored in a layout of their own. {_FOLD}",
    "kasa_config": f"KaSA puts singular values between the factors and truncates the base weights. {_FOLD}",
    "arrow_config": "Arrow routes between adapters and has no single update. Merge those adapters.",
    "monteclora_config": f"MonteCLoRA samples around its factors. {_PLAIN}",
    "velora_config": f"VeLoRA changes how the adapter is trained, in ways that are not checked here. {_PLAIN}",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens; merged, it would always act. "
    "Use it unmerged.",
}

_PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _compilable(pattern: str) -> str:
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the key is not a valid regular expression ({error})") from error
    return pattern


def _compiled(pattern: str) -> re.Pattern[str]:
    """The expression against which peft matches module names (``peft.utils.other.get_pattern_key``)."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _tokens(value: object) -> object:
    """Lists as tuples, one level down too."""
    if isinstance(value, Mapping):
        return {key: _as_tuple(item) for key, item in value.items()}
    return _as_tuple(value)


_Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[tuple[_Token, ...] | dict[str, tuple[_Token, ...]] | None, BeforeValidator(_tokens)]
_Regex = Annotated[str, AfterValidator(_compilable)]


class PeftConfig(BaseModel):
    """What a LoRA configuration says about merging.

    Attributes:
        raw: the configuration as stored.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: dict[_Regex, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[_Regex, FiniteFloat] = Field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: _Names = ()
    trainable_token_indices: _Tokens = None
    target_parameters: _Names = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    raw: dict[str, object]

    @classmethod
    def parse(cls, raw: Mapping[str, object], *, where: str) -> PeftConfig:
        """The configuration, checked.

        Raises:
            CheckpointError: all fields that are wrong, unknown, or not handled.
        """
        problems = [CheckpointError(f"{where}: {problem}") for problem in _unhandled_fields(raw)]
        given = {name: value for name, value in raw.items() if value is not None}
        try:
            config = cls.model_validate({**given, "raw": dict(raw)})
        except ValidationError as error:
            problems += [CheckpointError(f"{where}: {problem}") for problem in _invalid_fields(error)]
        raise_together(problems)
        return config

    def rank_of(self, module: str) -> int:
        """The rank that the configuration claims for a module."""
        return _first_match(self._ranks, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return _first_match(self._alphas, module, self.lora_alpha)

    def scaling_of(self, module: str, *, rank: int) -> float:
        """What multiplies b · a in a module whose factors have rank ``rank``: alpha/r, or alpha/√r with rsLoRA."""
        alpha = self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that were trained; None where the configuration names none of it."""
        given = self.trainable_token_indices
        if isinstance(given, dict):
            return next((rows for name, rows in given.items() if _names(name, module)), None)
        return given

    def saved_under(self, module: str) -> str | None:
        """What ``modules_to_save`` calls a module that holds a tensor, or one above it; None where it does not."""
        parts = module.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return next((name for name in self.modules_to_save if any(_names(name, path) for path in above)), None)

    def parameters_of(self, path: str) -> tuple[str, ...]:
        """The parameters among ``target_parameters`` that a module has, by their full names.

        peft nests those of one module under ``base_layer``, and does not say which is which.
        """
        holder = re.sub(r"(\.base_layer)+$", "", path)
        own = (name.rpartition(".") for name in self.target_parameters)
        return tuple(f"{holder}.{parameter}" for target, _, parameter in own if _names(target, holder))

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], int]]:
        return [(_compiled(pattern), rank) for pattern, rank in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        return [(_compiled(pattern), alpha) for pattern, alpha in self.alpha_pattern.items()]


def read_raw_config(path: Path, *, where: str) -> dict[str, object]:
    """The configuration in a file, unchecked.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {path} is not readable as JSON: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: {path} holds a {type(raw).__name__}; expected a JSON object.")
    return raw


def _names(target: str, module: str) -> bool:
    """Whether ``target`` is a module's name or the last parts of it, as peft matches its lists of names."""
    return module == target or module.endswith(f".{target}")


def _first_match(patterns: list[tuple[re.Pattern[str], _Value]], module: str, default: _Value) -> _Value:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _unhandled_fields(raw: Mapping[str, object]) -> Iterator[str]:
    """A message for each field that is set and neither honoured nor without effect."""
    special = {"init_lora_weights": _judge_initialisation}
    known = {*PeftConfig.model_fields, *_IGNORED, *_REFUSED, *special} - {"raw"}
    for name, value in raw.items():
        if name in special:
            yield from special[name](value)
        elif name in _REFUSED and not _is_unset(value):
            yield f"'{name}' is set to {_short(value)}, which is not handled: {_REFUSED[name]}"
        elif name not in known and not _is_unset(value):
            guess = nearest_name(name, known)
            yield (
                f"unknown field '{name}' is set to {_short(value)}"
                + (f"; did you mean '{guess}'? " if guess else ". ")
                + "Remove it if it does not change what the adapter computes."
            )


def _judge_initialisation(value: object) -> Iterator[str]:
    name = str(value).lower()
    if name.startswith(_BASE_CHANGING_INITIALISATIONS):
        yield (
            f"'init_lora_weights' is {_short(value)}, which changes the base weights, so that the adapter does not fit "
            "the original base. Save it as a plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    elif not _is_unset(value) and name not in _PLAIN_INITIALISATIONS:
        yield (
            f"'init_lora_weights' is {_short(value)}, which is unknown: it may change the base weights. "
            "Set it to true if it does not."
        )


def _invalid_fields(error: ValidationError) -> Iterator[str]:
    """A message for each field whose value is of the wrong type or out of range."""
    for problem in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "missing":
            yield f"'{field}' is missing. Every LoRA configuration has it: download {CONFIG_NAME} again."
        elif field == "peft_type":
            yield f"'peft_type' is {_short(problem['input'])}; expected LORA, ADALORA, LOHA, LOKR or VERA."
        else:
            reason = problem["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            yield f"'{field}' is {_short(problem['input'])}: {reason}."


def _is_unset(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict | tuple) and not value)


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
