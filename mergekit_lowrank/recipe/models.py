"""The recipe: one frozen model for each part of the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import AfterValidator, Field, PlainSerializer, PrivateAttr, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.document import write_yaml
from mergekit_lowrank.recipe.origin import Loc, Origin
from mergekit_lowrank.recipe.sizes import parse_bytes
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, Strict, expected, refused, told_as
from mergekit_lowrank.recipe.values import INT64_MAX, Parameters, Pattern, Text

__all__ = [
    "Budget",
    "Energy",
    "ErrorBound",
    "InMemoryAdapter",
    "ModelEntry",
    "Output",
    "Rank",
    "Recipe",
    "Retention",
    "Rule",
    "RuleRank",
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


class ErrorBound(Strict):
    """The smallest rank within this relative Frobenius error of the merged update."""

    error: float = Field(gt=0, lt=1, description="The largest ‖ΔW − ΔW_rank‖ / ‖ΔW‖ that a cut may cost.")


def _is_a_size(size: str | int) -> str | int:
    try:
        parse_bytes(str(size))
    except RecipeError:
        raise expected("an amount of memory such as 80MB") from None
    return size


class Budget(Strict):
    """Ranks that together take this many bytes, spread over the modules where they keep most."""

    budget: Annotated[
        str | int,
        AfterValidator(_is_a_size),
        WithJsonSchema({"type": ["string", "integer"], "exclusiveMinimum": 0}),
    ] = Field(description="Bytes of all factors as stored: a number, or one with a unit such as `80MB` or `1.5GiB`.")

    @property
    def bytes(self) -> int:
        """The size as a number of bytes."""
        return parse_bytes(str(self.budget))


Scale: TypeAlias = Annotated[
    float | Literal["auto"] | Retention,
    told_as(f"a finite number, 'auto', or {{retention: k}} with 0 < k <= {MAX_RETENTION:g}", "auto"),
]

RANKS = "'max', 'sum', a whole number of at least 1, {energy: e} with 0 < e <= 1, {error: e} with 0 < e < 1"

Rank: TypeAlias = Annotated[
    Literal["max", "sum"] | Annotated[int, Field(ge=1)] | Energy | ErrorBound | Budget,
    told_as(f"{RANKS}, or {{budget: SIZE}} with a size such as 80MB", "max", "sum"),
]

RuleRank: TypeAlias = Annotated[
    Literal["max", "sum"] | Annotated[int, Field(ge=1)] | Energy | ErrorBound,
    told_as(f"{RANKS} (a budget is for all modules: it stands in output.rank)", "max", "sum"),
]


def _ascends(ranks: Literal["vllm"] | tuple[int, ...]) -> Literal["vllm"] | tuple[int, ...]:
    if not isinstance(ranks, str):
        for index, (lower, rank) in enumerate(pairwise(ranks), 1):
            if rank <= lower:
                raise expected(f"ranks in ascending order, so one above {lower}", at=(index,), found=rank)
    return ranks


Snap: TypeAlias = Annotated[
    Literal["vllm"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), LIST_TO_TUPLE],
    told_as("'vllm', or a list of whole numbers of at least 1", "vllm"),
    AfterValidator(_ascends),
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

    rank: Rank | None = Field(
        default=None,
        description="`max`: the largest rank of the inputs; `sum`: their ranks together; a number; "
        "`{energy: 0.99}`: the smallest rank that keeps that share of the merged update; `{error: 0.05}`: the smallest "
        "within that relative error; or `{budget: 80MB}`: as many bytes, spread over the modules. When left out, the "
        "method's own: `max` or `sum`.",
    )
    uniform_rank: Annotated[bool, told_as("true or false")] = Field(
        default=True,
        description="Pad every module with zeros to one rank, which every server reads right. `false` writes "
        "`rank_pattern` with an equal `alpha_pattern`.",
    )
    snap: Snap | None = Field(
        default=None,
        description="Raise every written rank to the next that is accepted: by vLLM (`vllm`: 1, 8, 16, 32, 64, 128, "
        "256, 320, 512), or a list of your own.",
    )
    balance: Annotated[bool, told_as("true or false")] = Field(
        default=False,
        description="Split the singular values evenly: B = U·√S, A = √S·Vᵀ. The same update, to rounding.",
    )

    @model_validator(mode="after")
    def _a_budget_needs_own_ranks(self) -> Output:
        if isinstance(self.rank, Budget) and self.uniform_rank:
            raise refused(
                "a budget gives every module a rank of its own; add uniform_rank: false beside it "
                "(for one rank in all modules use a number or {energy: e})",
                at=("rank",),
            )
        return self


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
    rank: RuleRank | None = Field(default=None, description="Another output rank for these modules.")

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
        description="The coordinates the method works in, such as `delta` or `core`; the method's own when left out. "
        "`mergekit-lowrank strategies NAME` lists those it supports.",
    )
    scale: Scale = Field(
        default=1.0,
        description="What multiplies the merged update: a number; `{retention: k}`, the share of the inputs that "
        "survives; or `auto`, retention N^-0.4 for N inputs. mergekit's `parameters.lambda` is read as this.",
    )
    canonical: Annotated[Literal["svd"], told_as("'svd'", "svd")] | None = Field(
        default=None,
        description="`svd`: each input's factors are replaced by U·√S and √S·Vᵀ of its own update before they are "
        "merged, so that results in `factors` do not depend on how an update was factorised.",
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

    @model_validator(mode="after")
    def _a_budget_needs_known_ranks(self) -> Recipe:
        if isinstance(self.output.rank, Budget):
            for index, rule in enumerate(self.rules):
                if isinstance(rule.rank, Energy | ErrorBound):
                    raise refused(
                        "beside a budget the rank of a rule must be known beforehand: max, sum or a number",
                        at=("rules", index, "rank"),
                    )
        return self

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
