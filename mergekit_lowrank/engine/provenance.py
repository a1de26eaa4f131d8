"""Where a merge comes from: what its sources' cards say of licence and task, and what the output's header says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine.plan import Plan
from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.formats import Checkpoint, ModelDirectory
from mergekit_lowrank.recipe import Recipe
from mergekit_lowrank.recipe.document import read_yaml
from mergekit_lowrank.recipe.hub import HubId
from mergekit_lowrank.recipe.origin import shown

__all__ = [
    "Licence",
    "SourceCard",
    "agreed",
    "agreed_licence",
    "base_directory",
    "header_metadata",
    "licence_warnings",
    "named_base",
    "source_cards",
    "weight_range",
]

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 18
"""Read of a card: its front matter stands first, and lists of tags and results are shorter."""

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(?P<yaml>.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_LINE = re.compile(r"[^\x00-\x1f\x7f`|<>]{1,200}")
"""Text of others that the card repeats: nothing in it can end a line or a table's cell."""


@dataclass(frozen=True)
class Licence:
    """A licence as the Hugging Face Hub names it.

    Attributes:
        id: such as ``apache-2.0``; ``other`` for one that the Hub has no identifier of.
        name: of such another one.
        link: to its text.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name or self.link})" if self.name or self.link else self.id


@dataclass(frozen=True)
class SourceCard:
    """What the model card of one source says.

    Attributes:
        label: what messages call the source.
        licence: None where the card gives none.
        pipeline_tag: the Hub's name of its task.
        problem: why the card says nothing although it is there.
    """

    label: str
    licence: Licence | None = None
    pipeline_tag: str | None = None
    problem: str | None = None

    @classmethod
    def read(cls, label: str, directory: Path | None) -> SourceCard:
        """That of a directory. A card that cannot be read is no error of a merge: it says nothing, and why."""
        try:
            front = _front_matter(directory / CARD_NAME) if directory else {}
            return cls(label, _licence(front), _checked(front, "pipeline_tag", _IDENTIFIER))
        except RecipeError as error:
            return cls(label, problem=str(error))


def source_cards(
    recipe: Recipe, inputs: Sequence[Checkpoint], base: ModelDirectory | None = None
) -> tuple[SourceCard, ...]:
    """The cards of the inputs, in order, and then that of the base where it is a directory here.

    Args:
        recipe: of the merge.
        inputs: opened; those in memory have no card.
        base: the base model, where it is opened.
    """
    cards = [SourceCard.read(f"'{c.label}'", c.files[0].parent if c.files else None) for c in inputs]
    directory = base_directory(recipe, inputs, base)
    return (*cards, *([SourceCard.read("the base model", directory)] if directory else []))


def base_directory(recipe: Recipe, inputs: Sequence[Checkpoint], base: ModelDirectory | None = None) -> Path | None:
    """Where the base lies: opened, or a directory that the recipe or an input names; None where it is elsewhere."""
    if base is not None:
        return base.directory
    found = (_directory(recipe, name) for name in _bases(recipe, inputs))
    return next((directory for directory in found if directory is not None), None)


def agreed_licence(cards: Iterable[SourceCard]) -> Licence | None:
    """The licence of all sources that give one; ``other`` where they do not agree, None where none gives any."""
    given = {(card.licence.id, card.licence.name): card.licence for card in cards if card.licence}
    if len(given) > 1:
        return Licence("other")
    return next(iter(given.values()), None)


def licence_warnings(cards: Sequence[SourceCard]) -> Iterator[str]:
    """Cards that cannot be read, and licences that are not one."""
    for card in cards:
        if card.problem:
            yield f"the model card of {card.label} cannot be read ({card.problem}); it counts as giving no licence"
    licences = {card.label: card.licence for card in cards if card.licence}
    if len({(licence.id, licence.name) for licence in licences.values()}) > 1:
        named = "; ".join(f"{label}: {licence}" for label, licence in licences.items())
        yield (
            f"the sources have different licences ({named}); the model card says 'license: other' and lists them: "
            "whether the result may be passed on is for you to find out"
        )


def named_base(recipe: Recipe, inputs: Sequence[Checkpoint]) -> str | None:
    """The base as the Hub knows it where the recipe or an input says so; else as it is called here."""
    names = _bases(recipe, inputs)
    hub_ids = (HubId.parse(name) for name in names if _directory(recipe, name) is None)
    found = next((hub_id for hub_id in hub_ids if hub_id), None)
    return found.repository if found else next(iter(names), None)


def agreed(values: Iterable[str | None]) -> str | None:
    """The value that all agree on who give one, else None."""
    given = dict.fromkeys(value for value in values if value)
    return next(iter(given)) if len(given) == 1 else None


def weight_range(plan: Plan, t: int) -> tuple[float, float]:
    """The lowest and the highest weight of one input over its low-rank updates; over all its tensors without any."""
    own = [module for module in plan.modules if t in module.participants]
    factored = [module for module in own if module.is_factored] or own
    weights = [module.weights[module.participants.index(t)] for module in factored]
    return min(weights, default=0.0), max(weights, default=0.0)


def header_metadata(plan: Plan) -> dict[str, str]:
    """The ``__metadata__`` of a merged adapter's safetensors file: the same for every run of one merge.

    Transformers asks for ``format``. ``sources`` is JSON: the label of each input and its weight, or its lowest and
    highest one where modules differ.
    """
    ranges = [weight_range(plan, t) for t in range(len(plan.inputs))]
    sources = [
        {"label": checkpoint.label, "weight": low if low == high else [low, high]}
        for checkpoint, (low, high) in zip(plan.inputs, ranges, strict=True)
    ]
    base = named_base(plan.recipe, plan.inputs)
    return {
        "format": "pt",
        "mergekit_lowrank": __version__,
        "merge_method": plan.recipe.merge_method,
        **({"base_model": base} if base else {}),
        "sources": json.dumps(sources, ensure_ascii=False),
    }


def _bases(recipe: Recipe, inputs: Sequence[Checkpoint]) -> list[str]:
    """What the recipe and the inputs call the base."""
    return list(dict.fromkeys(name for name in (recipe.base_model, *(c.base_model for c in inputs)) if name))


def _directory(recipe: Recipe, base: str) -> Path | None:
    """The directory that a base is here, if it is one."""
    with suppress(OSError, ValueError, RuntimeError):  # no path at all
        path = recipe.directory / Path(base).expanduser()
        return path if path.is_dir() else None
    return None


def _front_matter(path: Path) -> Mapping[str, object]:
    """The YAML that a card begins with.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8-sig", errors="ignore").replace("\r\n", "\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RecipeError(f"{CARD_NAME}: {error.strerror or error}") from None
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    first = text.count("\n", 0, match.start("yaml")) + 1
    data = read_yaml(match["yaml"], locate=lambda line, column: f"{CARD_NAME}:{first + line}:{column + 1}").data
    if not isinstance(data, dict | None):
        raise RecipeError(f"{CARD_NAME}:{first}: expected keys such as 'license'")
    return data or {}


def _licence(front: Mapping[str, object]) -> Licence | None:
    found = _checked(front, "license", _IDENTIFIER)
    if found is None:
        return None
    if found.lower() != "other":
        return Licence(found.lower())
    return Licence("other", _checked(front, "license_name", _LINE), _checked(front, "license_link", _LINE))


def _checked(front: Mapping[str, object], key: str, pattern: re.Pattern[str]) -> str | None:
    """The text at one key, None where there is none.

    Raises:
        RecipeError: it is no such text.
    """
    value = front.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise RecipeError(f"{CARD_NAME}: expected one name under '{key}', found {shown(value)}")
    return value
