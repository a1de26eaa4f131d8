"""What the output section of a recipe may say: the kind of output, its rank and its form."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mergekit_lowrank.recipe.sizes import Size, bytes_of, parse_bytes
from mergekit_lowrank.recipe.strict import LIST_TO_TUPLE, Strict, expected, refused, told_as
from mergekit_lowrank.recipe.values import Text

__all__ = ["Budget", "Energy", "ErrorBound", "Output", "Rank", "RuleRank"]


class Energy(Strict):
    """The smallest rank that keeps this share of the merged update."""

    energy: float = Field(gt=0, le=1, description="The share of the sum of squared singular values that is kept.")


class ErrorBound(Strict):
    """The smallest rank within this relative Frobenius error of the merged update."""

    error: float = Field(gt=0, lt=1, description="The largest ‖ΔW − ΔW_rank‖ / ‖ΔW‖ that a cut may cost.")


class Budget(Strict):
    """Ranks that together take this many bytes, spread over the modules where they keep most."""

    budget: Size = Field(
        description="Bytes of all factors as stored: a number, or one with a unit such as `80MB` or `1.5GiB`."
    )

    @property
    def bytes(self) -> int:
        """The size as a number of bytes."""
        return parse_bytes(str(self.budget))


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


TARGETS = ("vllm", "sglang", "llama.cpp", "diffusers", "comfyui")

Snap: TypeAlias = Annotated[
    Literal["vllm"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), LIST_TO_TUPLE],
    told_as("'vllm', or a list of whole numbers of at least 1", "vllm"),
    AfterValidator(_ascends),
]

Target: TypeAlias = Annotated[
    Literal["vllm", "sglang", "llama.cpp", "diffusers", "comfyui"],
    told_as("'vllm', 'sglang', 'llama.cpp', 'diffusers' or 'comfyui'", *TARGETS),
]

ADAPTER_ONLY = ("uniform_rank", "snap", "balance", "format", "target")
"""Keys that say how factors are written; a model has none."""


class Output(Strict):
    """How the merged update is written."""

    kind: Annotated[Literal["adapter", "model"], told_as("'adapter' or 'model'", "adapter", "model")] = Field(
        default="adapter",
        description="`adapter`: the merged update as a PEFT adapter; `model`: added to the weights of `base_model`, "
        "written as a whole model.",
    )
    rank: Rank | None = Field(
        default=None,
        description="`max`: the largest rank of the inputs; `sum`: their ranks together; a number; "
        "`{energy: 0.99}`: the smallest rank that keeps that share of the merged update; `{error: 0.05}`: the smallest "
        "within that relative error; or `{budget: 80MB}`: as many bytes, spread over the modules. When left out, the "
        "method's own: `max` or `sum`; in a model nothing is cut.",
    )
    uniform_rank: Annotated[bool, told_as("true or false")] = Field(
        default=True,
        description="Pad every module with zeros to one rank, which every server reads right. `false` writes "
        "`rank_pattern` with an equal `alpha_pattern`. Adapters only.",
    )
    snap: Snap | None = Field(
        default=None,
        description="Raise every written rank to the next that is accepted: by vLLM (`vllm`: 1, 8, 16, 32, 64, 128, "
        "256, 320, 512), or a list of your own. Adapters only.",
    )
    balance: Annotated[bool, told_as("true or false")] = Field(
        default=False,
        description="Split the singular values evenly: B = U·√S, A = √S·Vᵀ. The same update, to rounding. Adapters "
        "only.",
    )
    format: Text = Field(
        default="peft",
        description="The dialect that an adapter is written in: `peft`, `gguf` (llama.cpp), or a plugin's, such as "
        "`kohya` and `diffusers`. `mergekit-lowrank plugins` lists them. Adapters only.",
    )
    target: Target | None = Field(
        default=None,
        description="The server that is to load the adapter: `vllm`, `sglang`, `llama.cpp`, `diffusers` or `comfyui`. "
        "Sets `format` and `snap` where they are left out, and refuses what the server would drop or misapply. "
        "Adapters only.",
    )
    shard_size: Size | None = Field(
        default=None,
        description="The most bytes of tensors in one file, as in `5GB`; a larger tensor gets a file of its own. When "
        "left out, the files of the base. Models only.",
    )

    @property
    def shard_bytes(self) -> int | None:
        """``shard_size`` as a number of bytes; None for the files of the base."""
        return bytes_of(self.shard_size)

    @model_validator(mode="after")
    def _a_model_is_a_kind(self) -> Output:
        if self.format == "model":
            raise refused("a model is a kind of output, no dialect of an adapter; write kind: model", at=("format",))
        return self

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Output:
        if self.kind == "adapter" and self.shard_size is not None:
            raise refused("an adapter is one file; leave it out, or write kind: model", at=("shard_size",))
        if self.kind == "model":
            for name in ADAPTER_ONLY:
                if name in self.model_fields_set and getattr(self, name) is not None:
                    raise refused("it says how factors are written, and a model has none; leave it out", at=(name,))
            if isinstance(self.rank, Budget):
                raise refused(
                    "a budget is for the factors of an adapter, and a model has none; use a number, {energy: e} or "
                    "{error: e}, or leave it out",
                    at=("rank",),
                )
        return self

    @model_validator(mode="after")
    def _a_budget_needs_own_ranks(self) -> Output:
        if isinstance(self.rank, Budget) and self.uniform_rank:
            raise refused(
                "a budget gives every module a rank of its own; add uniform_rank: false beside it "
                "(for one rank in all modules use a number or {energy: e})",
                at=("rank",),
            )
        return self

    @model_serializer(mode="wrap")
    def _as_its_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return data if self.kind == "adapter" else {key: data[key] for key in data if key not in ADAPTER_ONLY}
