"""Adapters of another rank, and adapters out of full fine-tunes: merges of one model at weight 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter

from mergekit_lowrank.api import merge
from mergekit_lowrank.engine import open_checkpoint, open_inputs
from mergekit_lowrank.errors import CheckpointError, RecipeError
from mergekit_lowrank.recipe import Budget, Energy, ErrorBound, parse_recipe, resolve_model
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report import Report

__all__ = ["RankLike", "extract", "resize"]

RankLike: TypeAlias = int | str | Mapping[str, object]
RANK_KINDS: Mapping[str, type] = {"energy": float, "error": float, "budget": str}
RANK = TypeAdapter[object](Annotated[int, Field(ge=1, strict=True)] | Energy | ErrorBound | Budget)
RANKS = (
    "a whole number of at least 1, energy:E with 0 < E <= 1, error:E with 0 < E < 1, or budget:SIZE, as in 32, "
    "energy:0.99, error:0.05 or budget:80MB"
)
LEFT_OUT = {"from": "base_model"}
POLICIES: Mapping[str, str | Mapping[str, str]] = {
    "error": "error",
    "average": "average",
    "delta": "delta",
    "base_model": LEFT_OUT,
    "{from: base_model}": LEFT_OUT,
}
WHAT_THEY_DO = "average or delta (saved whole), or base_model (left out: those of the base stay)"
SHOWN = 3
"""Tensors that a message names."""


def resize(
    source: str | Path,
    output: str | Path,
    *,
    rank: RankLike,
    base: str | Path | None = None,
    uniform_rank: bool = True,
    **options: Any,
) -> Report:
    """The adapter cut to another rank, in every module the best approximation of that rank.

    Exact: the singular values are those of the update, from the QR factors of B and A and the SVD of the r × r core
    between them (Halko et al. 2011, arXiv:0909.4061, section 1.2); no dense matrix is built. A rank above the
    adapter's own pads with zeros. What it holds beside factors is kept as it is.

    Args:
        source: the adapter: a path or ``org/name[@revision]``.
        output: the directory to make.
        rank: a number; ``{"energy": 0.99}``, ``{"error": 0.05}`` or ``{"budget": "80MB"}``; or these as text,
            ``energy:0.99``.
        base: directory of the base model, where the update cannot be computed without it (DoRA).
        uniform_rank: whether modules are padded to one rank; with a budget they never are.
        options: of ``merge``, such as ``overwrite`` and ``memory_bytes``.

    Returns:
        The report of the merge: ``rank``, ``kept_energy`` and ``cut_error`` of each module.

    Raises:
        MergeError: what ``merge`` raises; nothing is left at ``output``.
    """
    written = _rank(rank)
    if base is None:
        _refuse_without_base(source, options.get("registry"))
    recipe = _recipe(source, base, rank=written, uniform_rank=uniform_rank and not _is_budget(written))
    return _merged("resize", {**recipe, "extras": "average"}, output, options)


def extract(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    rank: RankLike,
    extras: str | Mapping[str, str] | None = None,
    uniform_rank: bool = True,
    **options: Any,
) -> Report:
    """An adapter of what a full fine-tune changed in its base: W − W0 cut to a rank, module by module.

    Differences are read in blocks of rows, so that neither model has to fit in memory.

    Args:
        source: directory of the fine-tune.
        output: the directory to make.
        base: directory of the model that it was tuned from.
        rank: as for ``resize``.
        extras: what becomes of norms, biases and other vectors that the fine-tune changed: ``error`` (the default of
            recipes: they are named), ``average`` or ``delta`` (saved whole), or ``base_model`` (left out), which is
            ``{"from": "base_model"}`` too.
        uniform_rank: as for ``resize``.
        options: of ``merge``, such as ``overwrite`` and ``memory_bytes``.

    Returns:
        The report of the merge: ``rank``, ``kept_energy`` and ``cut_error`` of each module.

    Raises:
        MergeError: what ``merge`` raises; nothing is left at ``output``.
    """
    written, policy = _rank(rank), _policy(extras)
    recipe = _recipe(source, base, rank=written, uniform_rank=uniform_rank and not _is_budget(written))
    if policy == "error":
        _refuse_beside_factors(recipe, options.get("registry"))
    return _merged("extract", {**recipe, "extras": policy}, output, options)


def _recipe(source: str | Path, base: str | Path | None, **output: object) -> dict[str, Any]:
    recipe = {"merge_method": "linear", "models": [{"model": str(source)}], "output": {"kind": "adapter", **output}}
    return recipe if base is None else {**recipe, "base_model": str(base)}


def _refuse_without_base(source: str | Path, registry: Registry | None) -> None:
    path = resolve_model(str(source), Path.cwd())
    checkpoint = open_checkpoint(path, registry or Registry.load(), label=str(source))
    if checkpoint.needs_base is not None:
        raise CheckpointError(
            f"'{checkpoint.label}': {checkpoint.needs_base}. Give the base model: --base DIR, in Python base=DIR."
        )


def _refuse_beside_factors(recipe: Mapping[str, Any], registry: Registry | None) -> None:
    """Raise what the fine-tune changed beside matrices, where nothing is said of it."""
    asked = parse_recipe({**recipe, "extras": "average"}, name="extract")
    (opened,) = open_inputs(asked, registry or Registry.load()).checkpoints
    names = [name for name, header in opened.modules.items() if header.replaces]
    if names:
        count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
        named = ", ".join(f"'{name}'" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise CheckpointError(
            f"'{opened.label}' changed {count} that no factors hold: {named}{more}. Say what becomes of such tensors "
            f"with --extras, in Python extras: {WHAT_THEY_DO}."
        )


def _merged(name: str, recipe: Mapping[str, Any], output: str | Path, options: Mapping[str, Any]) -> Report:
    made = merge(parse_recipe(recipe, name=name), output, **options)
    assert isinstance(made, Report)  # noqa: S101 - a recipe without a sweep, into a directory
    return made


def _rank(rank: RankLike) -> int | dict[str, object]:
    """The rank as a recipe has it.

    Raises:
        RecipeError: it is none of ``RANKS``.
    """
    try:
        written = _read_rank(rank)
        RANK.validate_python(written)
    except (KeyError, ValueError):  # so is what pydantic raises
        raise RecipeError(f"rank {rank!r}: expected {RANKS}") from None
    return written


def _read_rank(rank: RankLike) -> int | dict[str, object]:
    if isinstance(rank, Mapping):
        return dict(rank)
    if isinstance(rank, int):
        return rank
    kind, is_named, value = rank.partition(":")
    return {kind: RANK_KINDS[kind](value)} if is_named else int(rank)


def _policy(extras: str | Mapping[str, str] | None) -> str | Mapping[str, str]:
    """The policy as a recipe has it.

    Raises:
        RecipeError: it is none of ``POLICIES``.
    """
    if isinstance(extras, Mapping) and dict(extras) == LEFT_OUT:
        return LEFT_OUT
    if extras is None or (isinstance(extras, str) and extras in POLICIES):
        return POLICIES[extras or "error"]
    raise RecipeError(f"extras {extras!r}: expected error (they are named), {WHAT_THEY_DO}")


def _is_budget(rank: int | Mapping[str, object]) -> bool:
    return isinstance(rank, Mapping) and "budget" in rank
