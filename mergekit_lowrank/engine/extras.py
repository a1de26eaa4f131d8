"""What adapters hold beside low-rank factors, and fine-tunes beside matrices, under the recipe's ``extras`` policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError, IncompatibleInputsError, MergeError, raise_together
from mergekit_lowrank.formats import (
    Checkpoint,
    Derived,
    Extra,
    FactorableFineTune,
    Factored,
    FineTune,
    Layout,
    ModelDirectory,
    ModuleHeader,
    TokenRow,
    Whole,
)
from mergekit_lowrank.formats.layouts import PREFIX
from mergekit_lowrank.formats.parameters import matrix_shape
from mergekit_lowrank.lowrank import InputUpdate, StreamedUpdate, blocks_of_rows
from mergekit_lowrank.recipe import From, Recipe

__all__ = ["needs_base", "with_extras"]

BASE = "base_model"
SHOWN = 3
BLOCK_ENTRIES = 1 << 20

_ADVICE = (
    "Say what becomes of them with 'extras' in the recipe: average (of one input: that input), {{from: {label}}}, "
    "delta (merged as differences to base_model), or {{from: base_model}} to leave them out"
)


def needs_base(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether what lies beside the factors can be merged only with the base at hand."""
    return recipe.extras == "delta" and any(checkpoint.extras for checkpoint in checkpoints)


def with_extras(
    checkpoints: Sequence[Checkpoint], recipe: Recipe, base: ModelDirectory | None, dtype: torch.dtype
) -> list[Checkpoint]:
    """The inputs with what lies beside their factors as modules of their own, as the recipe has it.

    Args:
        checkpoints: the inputs, those that need the base already compared with it.
        recipe: its ``extras`` and the kind of its output.
        base: the base model, where it is open.
        dtype: of the rows that updates give.

    Raises:
        MergeError: there are such tensors and the recipe says nothing of them, or they cannot be merged as it says.
    """
    if recipe.output.kind == "adapter":
        checkpoints = [FactorableFineTune(own) if isinstance(own, FineTune) else own for own in checkpoints]
    if not any(own.extras for own in checkpoints):
        return [*checkpoints]
    if recipe.extras == "error":
        raise_together([*_undecided(checkpoints, recipe)])
    chosen = _chosen(checkpoints, recipe)
    wrapped = {
        name for own in checkpoints for name, header in own.modules.items() if isinstance(header.layout, Factored)
    }
    _refuse_both(chosen, checkpoints, wrapped)
    policy = _Policy(recipe, base, dtype, frozenset(wrapped))
    if recipe.output.kind == "model":
        _refuse_other_rows(chosen)
    return [_Extended(own, policy) if own in chosen and own.extras else own for own in checkpoints]


def _undecided(checkpoints: Sequence[Checkpoint], recipe: Recipe) -> Iterator[MergeError]:
    for index, checkpoint in enumerate(checkpoints):
        extras = checkpoint.extras.values()
        if extras:
            named = ", ".join(f"'{extra.key}'" for extra in [*extras][:SHOWN])
            more = f" and {len(extras) - SHOWN} more" if len(extras) > SHOWN else ""
            advice, count = _ADVICE.format(label=checkpoint.label), len(extras)
            what = (
                "a tensor that is no low-rank factor" if count == 1 else f"{count} tensors that are no low-rank factors"
            )
            yield CheckpointError(
                f"{recipe.where(('models', index, 'model'))}: '{checkpoint.label}' holds {what}: "
                f"{named}{more}. {advice}."
            )


def _chosen(checkpoints: Sequence[Checkpoint], recipe: Recipe) -> list[Checkpoint]:
    """The inputs whose tensors count."""
    if not isinstance(recipe.extras, From):
        return [*checkpoints]
    asked = recipe.extras.model
    found = [own for own in checkpoints if asked in {own.label, own.location}]
    if not found and asked != BASE:
        labels = ", ".join(own.label for own in checkpoints)
        raise recipe.problem(("extras", "from"), f"'{asked}' is none of the models ({labels}), nor base_model")
    return found


def _refuse_both(chosen: Sequence[Checkpoint], checkpoints: Sequence[Checkpoint], wrapped: set[str]) -> None:
    for own in chosen:
        for extra in own.extras.values():
            module = extra.name.rpartition(".")[0]
            if extra.saved_under and module in wrapped:
                other = next(c for c in checkpoints if module in c.modules)
                raise IncompatibleInputsError(
                    f"module '{module}' is saved whole in '{own.label}' and has low-rank factors in '{other.label}'; "
                    f"no adapter holds both. Leave one out, such as by extras: {{from: {BASE}}}"
                )


def _refuse_other_rows(chosen: Sequence[Checkpoint]) -> None:
    """In a model, rows are averaged over all inputs that have any of an embedding."""
    trained: dict[str, tuple[Checkpoint, tuple[int, ...]]] = {}
    for own in chosen:
        for extra in own.extras.values():
            if extra.tokens is not None:
                first, tokens = trained.setdefault(extra.name, (own, extra.tokens))
                if set(tokens) != set(extra.tokens):
                    raise IncompatibleInputsError(
                        f"'{first.label}' and '{own.label}' trained other rows of '{extra.name}', which are merged row "
                        "by row in an adapter only: write output: {kind: adapter}, and fold that"
                    )


@dataclass(frozen=True)
class _Policy:
    """How tensors become modules.

    Attributes:
        recipe: what it says.
        base: the base model, where it is open.
        dtype: of the rows.
        wrapped: modules with factors in any input.
    """

    recipe: Recipe
    base: ModelDirectory | None
    dtype: torch.dtype
    wrapped: frozenset[str]

    @property
    def replaces(self) -> bool:
        """Whether values stand for those of the base."""
        return self.recipe.extras != "delta"

    @property
    def are_differences(self) -> bool:
        """Whether what is merged are differences to the base, which is added again where the output is not the base."""
        return not self.replaces or self.recipe.output.kind == "model"

    def distinct(self, checkpoint: Checkpoint) -> list[Extra]:
        """What is merged of an input: where the output is a model, one of two copies that are tied in it."""
        extras = [*checkpoint.extras.values()]
        if self.base is None or self.recipe.output.kind == "adapter":
            return extras
        copies = [own for own in extras if self.base.is_tied_output(own.name.removesuffix(".weight"))]
        twins = {
            own.name
            for own in copies
            for other in extras
            if other not in copies
            and (own.shape, own.tokens) == (other.shape, other.tokens)
            and _are_equal(checkpoint, own, other)
        }
        return [own for own in extras if own.name not in twins]

    def module(self, extra: Extra) -> str:
        """The name of its module, by which inputs and the base meet."""
        owner, _, own = extra.name.rpartition(".")
        return owner if own == "weight" and len(extra.shape) == 2 and owner not in self.wrapped else extra.name

    def key(self, extra: Extra) -> str:
        """What the output calls it."""
        if extra.in_side_file:
            return extra.key
        owner, _, own = extra.name.rpartition(".")
        return f"{PREFIX}{owner}.base_layer.{own}" if owner in self.wrapped else PREFIX + extra.name

    def base_key(self, extra: Extra) -> str | None:
        """The parameter of the base that it is compared with; None where it is compared with nothing."""
        if not self.are_differences:
            return None
        if self.base is None:
            raise CheckpointError(
                f"'{extra.name}' is merged as the difference to the base, and none is given: add 'base_model', the "
                "path of the model that the inputs were tuned from"
            )
        module = extra.name.removesuffix(".weight")
        table = self.base.table_of(module) if self.recipe.output.kind == "adapter" else None
        module = table or (module if module in self.base.modules else extra.name)
        key = self.base.key_of(table) if table else self.base.keys_for([module]).popitem()[1]
        shape = self.base.source.specs[key].shape
        if extra.tokens is None and shape != extra.shape:
            raise CheckpointError(f"'{extra.name}' is {list(extra.shape)}, and {list(shape)} in the base")
        if extra.tokens is not None and (max(extra.tokens) >= shape[0] or extra.shape[1] != shape[1]):
            raise CheckpointError(f"rows {max(extra.tokens)} of '{extra.name}' are beyond the base's {list(shape)}")
        if self.base.is_transposed(self.base.module_of(key)):
            raise CheckpointError(f"'{extra.name}' is stored as (in, out); train it as factors instead")
        return key


class _Extended(Derived):
    """A checkpoint whose extras are modules.

    Args:
        checkpoint: whatever it is.
        policy: how they become that.
    """

    def __init__(self, checkpoint: Checkpoint, policy: _Policy) -> None:
        super().__init__(checkpoint)
        self._dtype = policy.dtype
        self._readers: dict[str, Callable[[slice], Tensor]] = {}
        modules = dict(checkpoint.modules)
        for extra in policy.distinct(checkpoint):
            for header, read in self._modules(extra, policy):
                modules[header.name], self._readers[header.name] = header, read
        self.modules = modules

    def read(self, module: str) -> InputUpdate:
        """The update of one module."""
        if module not in self._readers:
            return self.origin.read(module)
        own = self.modules[module]
        return StreamedUpdate((own.d_out, own.d_in), self._dtype, torch.device("cpu"), self._readers[module])

    def _modules(self, extra: Extra, policy: _Policy) -> Iterator[tuple[ModuleHeader, Callable[[slice], Tensor]]]:
        """The module of a tensor; of trained rows one for each, or in a model the embedding."""
        key = policy.base_key(extra)
        rows = _Rows(self.origin, extra.name, self._dtype)
        if key is not None:
            rows = replace(rows, base=policy.base, key=key)
        is_model = policy.recipe.output.kind == "model"
        onto = None if is_model else key
        if extra.tokens is None:
            layout = Whole(policy.key(extra), extra.shape, onto, extra.saved_under, extra.in_side_file)
            yield self._header(policy.module(extra), extra, layout, matrix_shape(extra.shape), policy), rows
            return
        trained = {token: replace(rows, first=row, base_first=token) for row, token in enumerate(extra.tokens)}
        if is_model and policy.base is not None and key is not None:
            shape = policy.base.matrix_shape(key)
            header = self._header(policy.module(extra), extra, Whole(key, shape), shape, policy)
            yield header, _Scattered(trained, shape, self._dtype)
            return
        module = extra.name.removesuffix(".weight")
        for token, row in trained.items():
            own = TokenRow(extra.key, module, token, onto)
            yield self._header(f"{module}[{token}]", extra, own, (1, extra.shape[1]), policy), row

    def _header(self, name: str, extra: Extra, layout: Layout, shape: tuple[int, int], policy: _Policy) -> ModuleHeader:
        rows, columns = shape
        return ModuleHeader(
            name=name,
            d_out=rows,
            d_in=columns,
            rank=min(rows, columns),
            scaling=1.0,
            dtype=extra.dtype,
            stored_bytes=rows * columns * extra.dtype.itemsize,
            is_dense=True,
            kind="vector",
            layout=layout,
            replaces=policy.replaces,
        )


def _are_equal(checkpoint: Checkpoint, one: Extra, other: Extra) -> bool:
    blocks = blocks_of_rows(matrix_shape(one.shape), BLOCK_ENTRIES)
    pairs = ((checkpoint.read_extra(one.name, block), checkpoint.read_extra(other.name, block)) for block in blocks)
    return all(torch.equal(*pair) for pair in pairs)


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor, or of its difference to the base, as new memory.

    Attributes:
        checkpoint: that has it.
        name: of the tensor.
        dtype: of the rows.
        first: the row of it that is row 0.
        base: what it is compared with; None for nothing.
        key: the parameter there.
        base_first: the row of that parameter that is row 0.
    """

    checkpoint: Checkpoint
    name: str
    dtype: torch.dtype
    first: int = 0
    base: ModelDirectory | None = None
    key: str = ""
    base_first: int = 0

    def __call__(self, where: slice) -> Tensor:
        start, stop = where.start or 0, where.stop
        own = slice(self.first + start, None if stop is None else self.first + stop)
        rows = self.checkpoint.read_extra(self.name, own).to(self.dtype, copy=True)
        if self.base is None:
            return rows
        there = slice(self.base_first + start, self.base_first + start + len(rows))
        return rows.sub_(self.base.read_rows(self.key, there).to(self.dtype))


@dataclass(frozen=True)
class _Scattered:
    """Rows of an embedding's difference to the base, of which only trained ones are not zero.

    Attributes:
        rows: of the trained tokens, by their number.
        shape: of the embedding.
        dtype: of the rows.
    """

    rows: Mapping[int, _Rows]
    shape: tuple[int, int]
    dtype: torch.dtype

    def __call__(self, where: slice) -> Tensor:
        start, stop, _ = where.indices(self.shape[0])
        found = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        for token, row in self.rows.items():
            if start <= token < stop:
                found[token - start] = row(slice(0, 1))[0]
        return found
