"""What a merge method is: parameters, the spaces it works in, and one function of a module's coordinates."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.lowrank import LowRankUpdate, Update
from mergekit_lowrank.spaces import BLOCK_ENTRIES, Coordinates, ModuleShape, Part, Space

__all__ = [
    "ElementwiseStrategy",
    "MergeContext",
    "Params",
    "Preset",
    "Strategy",
    "Survey",
    "keyed_generator",
    "per_input",
]


class Params(BaseModel):
    """Parameters of a strategy: a strict pydantic model, every field bounded and described."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def per_input_names(cls) -> frozenset[str]:
        """Names of the fields that a recipe may also give for one model (``models[].parameters``)."""
        return frozenset(
            name
            for name, info in cls.model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("per_input")
        )


def per_input(default: float, **constraints: Any) -> Any:
    """A pydantic field that a recipe may give for the whole merge or for one model; see ``MergeContext.each``."""
    return Field(default, json_schema_extra={"per_input": True}, **constraints)


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone: not on order, device, threads or the hash seed."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(key)[:8], "little") >> 1)


def _digest(key: Sequence[object]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()


@dataclass(frozen=True)
class MergeContext:
    """What a strategy may know of the module it merges, apart from the coordinates.

    Attributes:
        module: the module's name in the base model.
        participants: indices, in the recipe's list of models, of the inputs that have the module.
        weights: their coefficients.
        total_weight: Σ w over all inputs of the recipe: what ``linear`` divides by.
        input_params: for each participant the parameters that are its own (see ``each``).
        survey: what the survey of this module's group found; None for strategies without one.
        seed: the recipe's.
        labels: of the participants; random numbers are keyed by them, so that an input's do not depend on its place in
            the recipe. By default their indices.
    """

    module: str
    participants: tuple[int, ...]
    weights: tuple[float, ...]
    total_weight: float
    input_params: tuple[Mapping[str, Any], ...] = ()
    survey: Survey | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()

    def each(self, params: Params, name: str) -> tuple[Any, ...]:
        """One value of the parameter ``name`` for each participant: its own where the recipe gives one."""
        shared = getattr(params, name)
        own = self.input_params or ({},) * len(self.participants)
        return tuple(values.get(name, shared) for values in own)

    def generator(self, position: int, *purpose: object) -> torch.Generator:
        """Random numbers for the participant at ``position``, keyed by (seed, module, input, purpose)."""
        return keyed_generator(*self._key(position, *purpose))

    def random_words(self, position: int, *purpose: object) -> np.random.SFC64:
        """The same as a stream of raw 64-bit words (``random_raw``), which numpy keeps the same over its versions."""
        return np.random.SFC64(int.from_bytes(_digest(self._key(position, *purpose)), "little"))

    def _key(self, position: int, *purpose: object) -> tuple[object, ...]:
        who = self.labels[position] if self.labels else self.participants[position]
        return (self.seed, self.module, who, *purpose)


class Survey(ABC):
    """Small statistics over all modules that share a method, its parameters and its space, before any is merged.

    It runs in rounds. In each, ``measure`` is called once for every module, in any order and from several threads;
    the measurements are added up with ``+`` (which must be exact and order-free: integers, or arrays of them), and
    ``conclude`` takes the sum in. The finished survey is handed to ``merge`` as ``context.survey``.
    """

    @abstractmethod
    def measure(self, coordinates: Coordinates, context: MergeContext) -> Any:
        """The measurement of one module. Must not change the survey."""

    @abstractmethod
    def conclude(self, total: Any) -> bool:
        """Take the sum of one round in; whether another round is needed."""


BaseParams = Params


class Strategy(ABC):
    """A merge method. One instance serves every module that shares its parameters, from several threads.

    Class attributes:
        name: as recipes call it (``merge_method``).
        summary: one sentence.
        paper: where it comes from, or empty.
        Params: its parameters.
        spaces: the built-in spaces it works in, its default first.
        space_defaults: parameters of a space whose defaults this method changes.
        is_random: whether it draws random numbers (from ``context.generator`` or ``context.random_words`` only).
        is_order_free: whether permuted inputs give the same result, to rounding.
        min_inputs: how many models a recipe must at least give.
        max_inputs: how many at most; None for any number.
        default_rank: ``output.rank`` where the recipe gives none: ``max`` or ``sum``.
        keeps_factors: whether the merged factors must be written as they are: the plan then refuses a smaller rank, and
            factors that are balanced.
        takes_dense: whether inputs may be dense (full fine-tunes), in spaces that take them; the plan refuses them
            otherwise.
        stand_in: what merges norms, biases and embeddings, in ``delta``, in place of a method that does not work there:
            a method's name and its parameters. None: the plan refuses them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    Params: ClassVar[type[BaseParams]] = BaseParams
    spaces: ClassVar[tuple[str, ...]]
    space_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    is_random: ClassVar[bool] = False
    is_order_free: ClassVar[bool] = True
    min_inputs: ClassVar[int] = 1
    max_inputs: ClassVar[int | None] = None
    default_rank: ClassVar[Literal["max", "sum"]] = "max"
    keeps_factors: ClassVar[bool] = False
    takes_dense: ClassVar[bool] = False
    stand_in: ClassVar[tuple[str, Mapping[str, Any]] | None] = None

    def __init__(self, params: BaseParams) -> None:
        self.params = params

    @abstractmethod
    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The merged update of one module.

        Args:
            coordinates: of the n ≥ 1 updates, in one of the spaces the class names. Not to be modified.
            context: weights, per-input parameters, random numbers, survey.
        """

    def artefacts(
        self, coordinates: Coordinates, written: LowRankUpdate, scale: float, context: MergeContext
    ) -> Mapping[str, Tensor]:
        """More than the merged update: tensors to be stored beside it, by names that hold for every module.

        They become ``artefacts.safetensors``, as ``<module>.<name>``. A method without any leaves this as it is.

        Args:
            coordinates: as ``merge`` got them.
            written: the merged update as it is stored: scaled, cut and rounded.
            scale: what the scale policy multiplied it by; it is in ``written.b``.
            context: as ``merge`` got it.
        """
        del coordinates, written, scale, context
        return {}

    @classmethod
    def has_artefacts(cls) -> bool:
        """Whether the method returns more than the merged update."""
        return cls.artefacts is not Strategy.artefacts

    @classmethod
    def supports(cls, space: str) -> bool:
        """Whether the method works in the space of this name."""
        return space in cls.spaces

    def survey(self) -> Survey | None:
        """A new survey where the parameters need one, else None."""
        return None

    def returns_single_input(self) -> bool:
        """Whether one input at weight 1 comes back as it is, with these parameters."""
        return False

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """Coefficients c_t of the exact weighted sum Σ c_t ΔW_t that the report compares the result with."""
        del total_weight
        return tuple(weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Raise StrategyError for weights this method has no result for; called for every module by the plan."""

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """Upper estimate of the numbers held at once while merging one module in ``space``, inputs apart.

        By default what the space holds and the temporaries of one block.
        """
        return space.working_entries(shape) + 8 * max(BLOCK_ENTRIES, shape.inputs * max(shape.d_in, shape.d_out))

    def scratch_entries(self, shape: ModuleShape, space: Space) -> int:
        """Those of the working entries that lie in ``scratch.empty`` tensors. By default those of the space."""
        return space.scratch_entries(shape)


class ElementwiseStrategy(Strategy):
    """A method that merges entry by entry: one function from n blocks to one. It works in every space, a plugin's too.

    A subclass implements ``merge_block``, or ``merge_part`` where it needs a first pass over the whole part (for a
    threshold, say).
    """

    spaces: ClassVar[tuple[str, ...]] = ("delta", "joint", "core", "tucker", "factors")
    takes_dense: ClassVar[bool] = True

    @classmethod
    def supports(cls, space: str) -> bool:  # noqa: ARG003 - whatever it is
        """Every space."""
        return True

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        """The merged entries of one block.

        Args:
            block: (n, …), coordinates of n inputs. Not to be modified.
            weights: (n, 1, 1), their coefficients in this part.
            context: of the module.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement merge_block or merge_part")

    def merge_part(self, part: Part, context: MergeContext) -> Tensor:
        """(rows, columns) of the merged part; by default ``merge_block`` over its blocks."""
        weights = column(part.weights, part)
        return part.merged(lambda block: self.merge_block(block, weights, context))

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """Every part merged, then decoded."""
        return coordinates.decode([self.merge_part(part, context) for part in coordinates.parts])


def column(values: Sequence[float], part: Part) -> Tensor:
    """N numbers as an (n, 1, 1) tensor beside the blocks of a part."""
    return torch.tensor(values, dtype=part.dtype, device=part.device).view(-1, 1, 1)


@dataclass(frozen=True)
class Preset:
    """A strategy with its space or some of its parameters fixed, under the name users know.

    Attributes:
        name: as recipes call it.
        strategy: the strategy behind it.
        summary: one sentence.
        paper: where it comes from, or empty.
        space: its space; None for the strategy's default.
        parameters: what it fixes; a recipe may still set the others.
        rank: ``output.rank`` where the recipe gives none; None for the strategy's.
        low_rank_only: whether dense inputs are refused although the strategy takes them.
    """

    name: str
    strategy: type[Strategy]
    summary: str
    paper: str = ""
    space: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: Literal["max", "sum"] | None = None
    low_rank_only: bool = False

    @property
    def takes_dense(self) -> bool:
        """Whether inputs may be dense, in spaces that take them."""
        return self.strategy.takes_dense and not self.low_rank_only

    @property
    def default_rank(self) -> Literal["max", "sum"]:
        """``output.rank`` where the recipe gives none."""
        return self.rank or self.strategy.default_rank

    def __post_init__(self) -> None:
        if self.space is not None and not self.strategy.supports(self.space):
            raise StrategyError(
                f"preset '{self.name}': '{self.strategy.name}' does not work in space '{self.space}'; "
                f"it supports {', '.join(self.strategy.spaces)}"
            )
