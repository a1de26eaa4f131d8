"""Adapters of another rank, and adapters out of full fine-tunes: merges of one model at weight 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lowrank.api import merge
from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.report import Report

__all__ = ["RankLike", "extract", "resize"]

RankLike: TypeAlias = int | str | Mapping[str, object]
RANK_KINDS: Mapping[str, type] = {"energy": float, "error": float, "budget": str}


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
    recipe = _recipe(source, base, rank=written, uniform_rank=uniform_rank and not _is_budget(written))
    return _merged({**recipe, "extras": "average"}, output, options)


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
            recipes: they are named), ``average`` or ``delta`` (saved whole), or ``{"from": "base_model"}`` (left out).
        uniform_rank: as for ``resize``.
        options: of ``merge``, such as ``overwrite`` and ``memory_bytes``.

    Returns:
        The report of the merge: ``rank``, ``kept_energy`` and ``cut_error`` of each module.

    Raises:
        MergeError: what ``merge`` raises; nothing is left at ``output``.
    """
    written = _rank(rank)
    recipe = _recipe(source, base, rank=written, uniform_rank=uniform_rank and not _is_budget(written))
    policy = {} if extras is None else {"extras": dict(extras) if isinstance(extras, Mapping) else extras}
    return _merged({**recipe, **policy}, output, options)


def _recipe(source: str | Path, base: str | Path | None, **output: object) -> dict[str, Any]:
    recipe = {"merge_method": "linear", "models": [{"model": str(source)}], "output": {"kind": "adapter", **output}}
    return recipe if base is None else {**recipe, "base_model": str(base)}


def _merged(recipe: Mapping[str, Any], output: str | Path, options: Mapping[str, Any]) -> Report:
    made = merge(recipe, output, **options)
    assert isinstance(made, Report)  # noqa: S101 - a recipe without a sweep, into a directory
    return made


def _rank(rank: RankLike) -> int | dict[str, object]:
    """The rank as a recipe has it.

    Raises:
        RecipeError: text that is none of ``N``, ``energy:E``, ``error:E`` and ``budget:SIZE``.
    """
    if isinstance(rank, Mapping):
        return dict(rank)
    if isinstance(rank, int):
        return rank
    kind, is_named, value = rank.partition(":")
    try:
        return {kind: RANK_KINDS[kind](value)} if is_named else int(rank)
    except (KeyError, ValueError):
        expected = "a whole number, energy:E, error:E or budget:SIZE, as in 32, energy:0.99, error:0.05 or budget:80MB"
        raise RecipeError(f"rank '{rank}': expected {expected}") from None


def _is_budget(rank: int | Mapping[str, object]) -> bool:
    return isinstance(rank, Mapping) and "budget" in rank
