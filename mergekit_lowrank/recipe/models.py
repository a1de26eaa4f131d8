"""The recipe: one frozen model for each part of the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import AfterValidator, Field, PlainSerializer, PrivateAttr, model_validator
from pydantic.json_schema import SkipJsonSchema

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.document import write_yaml
from mergekit_lowrank.recipe.origin import Loc, Origin
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, Strict, expected, refused, told_as
from mergekit_lowrank.recipe.values import INT64_MAX, Parameters, Pattern, Text

__all__ = [
    "Energy",
    "InMemoryAdapter",
    "ModelEntry",
    "Output",
    "Rank",
    "Recipe",
    "Retention",
    "Rule",
    "Scale",
    "recipe_schema",
]

IN_MEMORY = "<in-memory adapter>"
"""How an adapter that was never a file appears in written recipes."""

MAX_RETENTION = 10.0
"""No policy scales a merged update by more (DESIGN, section 2), so a larger retention is a slip."""


@runtime_checkable
class InMemoryAdapter(Protocol):
    """An adapter that was never written: its tensors by their names in the file, and its PEFT configuration."""

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name, as in ``adapter_model.safetensors``."""

    @property
    def config(self) -> Any:
        """The configuration, as in ``adapter_config.json``."""


def _has_tensors(model: str | InMemoryAdapter) -> str | InMemoryAdapter:
    if not isinstance(model, str) and not isinstance(model.state_dict, Mapping):
        raise expected("an in-memory adapter whose 'state_dict' is a mapping of names to tensors")
    return model


def _is_a_merge(method: str) -> str:
    if method == "passthrough":
        raise refused("'passthrough' copies layers and merges nothing; to keep one adapter unchanged, use 'linear'")
    return method


Method = Annotated[Text, AfterValidator(_is_a_merge)]

Model = Annotated[
    Text | SkipJsonSchema[InMemoryAdapter],
    told_as("a path, a Hugging Face id such as 'org/name', or an in-memory adapter"),
    AfterValidator(_has_tensors),
    PlainSerializer(lambda model: model if isinstance(model, str) else IN_MEMORY, return_type=str),
]


class Retention(Strict):
    """The merged update is scaled until this share of its inputs survives in it."""

    retention: float = Field(gt=0, le=MAX_RETENTION, description="The share of the inputs that survives the merge.")


class Energy(Strict):
    """The smallest rank that keeps this share of the merged update."""

    energy: float = Field(gt=0, le=1, description="The share of the sum of squared singular values that is kept.")


Scale: TypeAlias = Annotated[
    float | Literal["auto"] | Retention,
    told_as(f"a finite number, 'auto', or {{retention: k}} with 0 < k <= {MAX_RETENTION:g}", "auto"),
]

Rank: TypeAlias = Annotated[
    Literal["max", "sum"] | Annotated[int, Field(ge=1)] | Energy,
    told_as("'max', 'sum', a whole number of at least 1, or {energy: e} with 0 < e <= 1", "max", "sum"),
]

STORED_TYPES = ("float16", "bfloat16", "float32", "float64")
MISSING_POLICIES = ("zero", "present", "error")


class ModelEntry(Strict):
    """One input of the merge."""

    model: Model = Field(
        description="A path (relative to the recipe), or `org/name`, `org/name@revision` or `hf:org/name` on the "
        "Hugging Face Hub. An existing path wins. In Python also an in-memory adapter."
    )
    parameters: Parameters = Field(
        default={},
        description="`weight` (1 when left out; may be negative) and whatever the method takes per input. Wins over "
        "the parameters of the recipe.",
    )


class Output(Strict):
    """How the merged update is written."""

    rank: Rank = Field(
        default="max",
        description="`max`: the largest rank of the inputs; `sum`: their ranks together; a number; or "
        "`{energy: 0.99}`: the smallest rank that keeps that share of the merged update.",
    )
    uniform_rank: Annotated[bool, told_as("true or false")] = Field(
        default=True,
        description="Pad every module with zeros to one rank, which every server reads right. `false` writes "
        "`rank_pattern` with an equal `alpha_pattern`.",
    )


class Rule(Strict):
    """Different settings for the modules that a pattern matches; the first rule that matches wins."""

    match: Pattern = Field(
        description="Part of a module's name; or `glob:` and a pattern of the whole name; or `regex:` and an "
        "expression to find in it."
    )
    merge_method: Method | None = Field(
        default=None,
        description="Another method for these modules; it does not inherit the parameters of the recipe.",
    )
    parameters: Parameters = Field(default={}, description="Parameters that win over those of the recipe.")
    space: Text | None = Field(default=None, description="Another space for these modules.")
    scale: Scale | None = Field(default=None, description="Another scale for these modules.")
    rank: Rank | None = Field(default=None, description="Another output rank for these modules.")

    @model_validator(mode="after")
    def _changes_something(self) -> Rule:
        if self.model_fields_set == {"match"}:
            raise refused("this rule changes nothing; add merge_method, parameters, space, scale or rank")
        return self


class Recipe(Strict):
    """What to merge and how."""

    merge_method: Method = Field(description="The strategy or preset, such as `linear`, `ties`, `robustmerge`, `drm`.")
    models: Annotated[tuple[ModelEntry, ...], LIST_TO_TUPLE] = Field(min_length=1, description="The inputs.")
    parameters: Parameters = Field(
        default={},
        description="Parameters of the method: a scalar; a list of numbers, interpolated over depth; or a list of "
        "`{filter, value}`, of which the first match wins.",
    )
    space: Text | None = Field(
        default=None,
        description="The coordinates the method works in (`factors`, `delta`, `joint`, `core`); the method's own when "
        "left out.",
    )
    scale: Scale = Field(
        default=1.0,
        description="What multiplies the merged update: a number; `{retention: k}`, the share of the inputs that "
        "survives; or `auto`, retention N^-0.4 for N inputs. mergekit's `parameters.lambda` is read as this.",
    )
    output: Output = Field(default=Output(), description="The rank of what is written, and its form.")
    dtype: Annotated[
        Literal["float32", "float64"],
        told_as("'float32' or 'float64', the type computed in; for the stored type write, say, 'out_dtype: bfloat16'"),
    ] = Field(default="float32", description="The type that is computed in.")
    out_dtype: (
        Annotated[
            Literal["float16", "bfloat16", "float32", "float64"],
            told_as("'float16', 'bfloat16', 'float32' or 'float64'", *STORED_TYPES),
        ]
        | None
    ) = Field(default=None, description="The stored type; when left out, the widest of the inputs.")
    missing: Annotated[
        Literal["zero", "present", "error"], told_as("'zero', 'present' or 'error'", *MISSING_POLICIES)
    ] = Field(
        default="zero",
        description="For a module that some inputs lack. `zero`: they contribute nothing there; `present`: the weights "
        "are renormalised over those that have it; `error`: refuse.",
    )
    rules: Annotated[tuple[Rule, ...], LIST_TO_TUPLE] = Field(
        default=(), description="Other settings for some modules; the first rule that matches wins."
    )
    base_model: Text | None = Field(
        default=None,
        description="The base model, a path or Hugging Face id, where a method or the model card needs it.",
    )
    seed: Annotated[
        int, Field(ge=0, le=INT64_MAX), told_as(f"a whole number between 0 and 2^{INT64_MAX.bit_length()} - 1")
    ] = Field(default=0, description="Seeds the random numbers of methods that draw any.")

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def directory(self) -> Path:
        """What relative paths in the recipe start from: the recipe file's directory, else the working directory."""
        return self._origin.directory

    def where(self, loc: Loc, *, key: bool = False) -> str:
        """``recipe.yaml:12:5`` for the value at ``loc`` (for its key, with ``key``), or the override that set it."""
        return self._origin.where(loc, key=key)

    def problem(self, loc: Loc, message: str, *, key: bool = False) -> RecipeError:
        """An error about the value at ``loc`` that starts with its place and its name, to be raised or collected."""
        return RecipeError(f"{self._origin.prefix(loc, key=key)}: {message}")

    def to_yaml(self) -> str:
        """The recipe with its defaults written out, in canonical order; what was left out and has no default is not."""
        return write_yaml(_without_empty(self.model_dump(mode="json")))


def _without_empty(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_empty(value) for key, value in data.items() if value not in (None, {}, [])}
    return [_without_empty(entry) for entry in data] if isinstance(data, list) else data


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
