"""What is fuzzed: every reader, and the valid inputs whose mutations it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from mergekit_lowrank import Registry
from mergekit_lowrank.engine.provenance import SourceCard
from mergekit_lowrank.errors import CheckpointError, RecipeError
from mergekit_lowrank.formats import Checkpoint, FusedExperts, ModelDirectory
from mergekit_lowrank.formats.tokenizers import TokenizerSource, agreed_tokenizer
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.recipe import load_recipe, parse_recipe
from tests.fuzzing import samples
from tests.fuzzing.contents import Sample

__all__ = ["Reader", "Target", "targets"]

Reader = Callable[[Path], object]
"""Reads all that a directory holds."""

_PLUGINS = Path(__file__).parents[2] / "plugins"


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: what reports call it.
        samples: valid inputs.
        read: what reads them.
        kept: files that are not mutated.
        reads_anywhere: whether the input is the user's own text, which may name any file.
    """

    name: str
    samples: Sequence[Sample]
    read: Reader
    kept: frozenset[str] = frozenset()
    reads_anywhere: bool = False


def targets(base: Path) -> dict[str, Target]:
    """All of them by name.

    Args:
        base: a valid model with the parameters ``samples.BASE``, and a tokenizer.
    """
    registry = Registry()
    checkpoint = partial(_read_checkpoint, registry, ModelDirectory(base))
    found = [
        Target("lora", samples.LORAS, checkpoint),
        Target("variants", samples.VARIANTS, checkpoint),
        Target("pickles", samples.PICKLES, checkpoint),
        Target("llava", samples.LLAVA, checkpoint),
        Target("sharded", samples.SHARDED, checkpoint),
        Target("models", samples.FINE_TUNES, checkpoint),
        Target("cards", samples.CARDS, _read_card),
        Target("tokenizers", samples.TOKENIZERS, partial(_read_tokenizer, base)),
        Target("recipes", samples.RECIPES, _read_recipe, frozenset({"weights.csv"}), reads_anywhere=True),
        Target("weight files", samples.WEIGHT_FILES, _read_weights),
    ]
    if _registers_diffusion(registry):
        found.append(Target("diffusion", samples.DIFFUSION, checkpoint))
    return {target.name: target for target in found}


def _registers_diffusion(registry: Registry) -> bool:
    path = str(_PLUGINS / "mergekit-lowrank-diffusion")
    if find_spec("mergekit_lowrank_diffusion") is None and Path(path).is_dir():
        sys.path.insert(0, path)
    if find_spec("mergekit_lowrank_diffusion") is None:
        return False
    import mergekit_lowrank_diffusion

    registry.register(mergekit_lowrank_diffusion, "diffusion")
    return True


def _read_checkpoint(registry: Registry, base: ModelDirectory, directory: Path) -> None:
    """As the first format that recognises it, alone and with its base."""
    formats = [form() for form in registry.formats.values()]
    known = next((form for form in formats if form.recognises(directory)), None)
    if known is None:
        raise CheckpointError("no format recognises it")
    checkpoint = known.open(directory, label="fuzz")
    for name, extra in checkpoint.extras.items():
        rows = checkpoint.read_extra(name, slice(None))
        assert rows.numel() == torch.Size(extra.shape).numel(), name
    if checkpoint.needs_base is None:
        _read_modules(checkpoint)
    based = checkpoint.against(base, torch.float32)
    _read_modules(FusedExperts.of(based, base, torch.float32))


def _read_modules(checkpoint: Checkpoint) -> None:
    for name, header in checkpoint.modules.items():
        update = checkpoint.read(name)
        shape = tuple(update.shape)
        assert shape == (header.d_out, header.d_in), f"{name}: the header says {header}, the update has {shape}"
        if isinstance(update, LowRankUpdate):
            assert update.rank == header.rank, f"{name}: the header says {header}, the update has rank {update.rank}"
        else:
            assert tuple(update.rows(slice(None)).shape) == shape, name


def _read_card(directory: Path) -> None:
    """Its problem is no error of a merge; here it is one, so that it counts as an outcome."""
    card = SourceCard.read("fuzz", directory)
    if card.problem:
        raise RecipeError(card.problem)


def _read_tokenizer(base: Path, directory: Path) -> None:
    """By itself, and compared with another."""
    own, other = TokenizerSource("fuzz", directory), TokenizerSource("base", base)
    for path in agreed_tokenizer([own, other]).values():
        path.read_bytes()


def _read_recipe(directory: Path) -> None:
    load_recipe(directory / "recipe.yaml").to_yaml()


def _read_weights(directory: Path) -> None:
    models = [{"model": "a", "parameters": {"weight": {"file": "weights.csv"}}}, {"model": "b"}]
    parse_recipe({"merge_method": "linear", "models": models}, directory=directory)
