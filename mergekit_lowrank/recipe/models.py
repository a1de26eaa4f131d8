"""The recipe: one frozen model for each part of the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import AfterValidator, Field, PlainSerializer, PrivateAttr, model_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.document import write_yaml
from mergekit_lowrank.recipe.execution import Execution
from mergekit_lowrank.recipe.origin import Loc, Origin
from mergekit_lowrank.recipe.output import Budget, Energy, ErrorBound, Output, RuleRank
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, Strict, expected, refused, told_as
from mergekit_lowrank.recipe.sweep import Sweep
from mergekit_lowrank.recipe.values import INT64_MAX, Parameters, Pattern, Text

__all__ = ["From", "InMemoryAdapter", "ModelEntry", "Recipe", "Retention", "Rule", "Scale", "recipe_schema"]

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


class From(Strict):
    """The tensors of one model."""

    model: Text = Field(
        alias="from", description="A model of the recipe, by its path or label, or `base_model` for none of them."
    )

    @model_serializer
    def _as_written(self) -> dict[str, str]:
        return {"from": self.model}


Extras: TypeAlias = Annotated[
    Literal["error", "average", "delta"] | From,
    told_as("'error', 'average', 'delta' or {from: a model of the recipe, or base_model}", "error", "average", "delta"),
]

Scale: TypeAlias = Annotated[
    float | Literal["auto"] | Retention,
    told_as(f"a finite number, 'auto', or {{retention: k}} with 0 < k <= {MAX_RETENTION:g}", "auto"),
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
    models: Annotated[tuple[ModelEntry, ...], LIST_TO_TUPLE] = Field(
        min_length=1, description="The inputs: adapters, or models that were tuned from `base_model`."
    )
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
    output: Output = Field(default=Output(), description="What is written: its kind, its rank and its form.")
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
    ) = Field(
        default=None,
        description="The stored type; when left out, the widest of the inputs. In a model, each tensor keeps that of "
        "the base.",
    )
    missing: Annotated[
        Literal["zero", "present", "error"], told_as("'zero', 'present' or 'error'", *MISSING_POLICIES)
    ] = Field(
        default="zero",
        description="For a module that some inputs lack. `zero`: they contribute nothing there; `present`: the weights "
        "are renormalised over those that have it; `error`: refuse.",
    )
    extras: Extras = Field(
        default="error",
        description="For tensors that are no low-rank factors: modules saved whole, biases, trained token rows, "
        "projectors; of fine-tunes that become an adapter also norms. `error`: refuse, naming them; `average`: by "
        "weight (of one input: that input's); `delta`: their differences to `base_model`, merged as all else; "
        "`{from: MODEL}`: those of one model, or of `base_model`, which leaves them out.",
    )
    tokenizer_source: Text | None = Field(
        default=None,
        description="Whose tokenizer and chat template go with the output: `base`, or a model of the recipe. When left "
        "out, all that have one must agree.",
    )
    rules: Annotated[tuple[Rule, ...], LIST_TO_TUPLE] = Field(
        default=(), description="Other settings for some modules; the first rule that matches wins."
    )
    base_model: Text | None = Field(
        default=None,
        description="The base model, a path or Hugging Face id. Its name goes into the model card; its weights are "
        "read only for `output.kind: model`, fine-tunes, DoRA and `extras: delta`.",
    )
    seed: Annotated[
        int, Field(ge=0, le=INT64_MAX), told_as(f"a whole number between 0 and 2^{INT64_MAX.bit_length()} - 1")
    ] = Field(default=0, description="Seeds the random numbers of methods that draw any.")
    execution: Execution = Field(
        default=Execution(), description="What the merge may use; it never changes what comes out."
    )
    sweep: Sweep = Field(
        default={},
        description="Variants of this recipe, all merged from one reading of the inputs: lists of values by key path, "
        "as in `{parameters.density: [0.1, 0.2]}`, of which every combination is one; or a list of variants, as in "
        "`[{name: sparse, parameters.density: 0.1}]`.",
    )

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

    @model_validator(mode="after")
    def _a_model_needs_a_base(self) -> Recipe:
        if self.output.kind == "model" and self.base_model is None:
            raise refused(
                "the merged update is added to a base model; name its directory under base_model", at=("output", "kind")
            )
        return self

    def variants(self) -> tuple[tuple[str, Recipe], ...]:
        """Each variant of the sweep with its name, which is safe for a directory; without a sweep ``(("", self),)``.

        Raises:
            RecipeError: every problem of every variant; a recipe that was loaded has none.
        """
        from mergekit_lowrank.recipe.checking import variants_of  # a variant is checked like a recipe that is read

        return variants_of(self)

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
        data = self.model_dump(mode="json")
        sweep = data.pop("sweep")  # an empty value in it is a value
        return write_yaml(_without_empty(data) | ({"sweep": sweep} if sweep else {}))


def _without_empty(data: Any) -> Any:
    if isinstance(data, dict):
        full = {key: _without_empty(value) for key, value in data.items()}
        return {key: value for key, value in full.items() if value not in (None, {}, [])}
    return [_without_empty(entry) for entry in data] if isinstance(data, list) else data


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
