"""YAML 1.2 text to plain values and back, with the place of each key and value."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe.origin import Loc, Place, shown

__all__ = ["MAX_DEPTH", "MAX_NODES", "Document", "Locate", "read_yaml", "write_yaml"]

MAX_NODES = 100_000
"""Keys and values a recipe may hold, each alias counted as a copy of what it stands for."""

MAX_DEPTH = 32
"""Levels of nesting; a recipe needs seven."""

Locate: TypeAlias = Callable[[int, int], str]
"""Says where a line and a column (both from 0) are, for errors."""

PLAIN_TEXT = re.compile(r"[\w./~][\w./~ @+-]*", re.ASCII)
"""Text that may stand without quotes, unless it would read as a number, true, false or null."""

_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """Plain mappings, lists and scalars, with the places of those that were read from text."""

    data: object
    places: Mapping[Loc, Place]


def read_yaml(text: str, *, locate: Locate) -> Document:
    """The one document in ``text``; None when it is empty.

    Nothing is constructed before the node graph was found small enough, so aliases that multiply cost nothing.

    Raises:
        RecipeError: not YAML 1.2, too large or deep, recursive, a key twice, or a tag beyond YAML's core.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # YAML 1.2 lets an anchor be set again
    try:
        root = yaml.compose(text)
        if root is None:
            return Document(None, {})
        _Measure(locate).check(root)
    except RecursionError:
        raise RecipeError(f"{locate(0, 0)}: nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except YAMLError as error:
        raise _syntax_error(error, text, locate=locate) from None
    except (ValueError, OverflowError, IndexError) as error:  # what ruamel lets through, as for "\UFFFFFFFF"
        raise RecipeError(f"{locate(0, 0)}: not valid YAML: {error}") from None
    reading = _Reading(yaml.constructor, locate)
    return Document(reading.placed(root, (), key=root), reading.places)


class _CarefulRepresenter(SafeRepresenter):
    """Quotes all text but plain words: the emitter leaves some text bare that its own parser reads otherwise."""


def _represent_text(representer: _CarefulRepresenter, text: str) -> ScalarNode:
    style = None if PLAIN_TEXT.fullmatch(text) else '"'
    node: ScalarNode = representer.represent_scalar(f"{_CORE}str", text, style=style)
    return node


_CarefulRepresenter.add_representer(str, _represent_text)


def write_yaml(data: object) -> str:
    """``data`` as YAML, keys in their order, what holds only scalars on one line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _CarefulRepresenter
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel annotates its default, None
    yaml.width = 1 << 20  # lines that are folded inside escaped text do not always read back the same
    # The emitter folds these line breaks into plain ones, unless it escapes all that is not ASCII.
    yaml.allow_unicode = not re.search("[\x85\u2028\u2029]", json.dumps(data, ensure_ascii=False))
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _syntax_error(error: YAMLError, text: str, *, locate: Locate) -> RecipeError:
    if isinstance(error, ReaderError):
        line_start = text.rfind("\n", 0, error.position) + 1
        where = locate(text.count("\n", 0, error.position), error.position - line_start)
        return RecipeError(f"{where}: not valid YAML: the character {shown(text[error.position])} is not allowed")
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = locate(mark.line, mark.column) if mark else locate(0, 0)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return RecipeError(f"{where}: not valid YAML: {what}")
    return RecipeError(f"{locate(0, 0)}: not valid YAML: {error}")


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, SequenceNode) else []


class _Measure:
    """Counts what a node expands to, once per node however many aliases lead to it."""

    def __init__(self, locate: Locate) -> None:
        self._locate = locate
        self._known: dict[int, tuple[int, int] | None] = {}  # None while a node is being counted

    def check(self, node: Node) -> tuple[int, int]:
        """The number of expanded nodes and of levels of ``node``, when both are within bounds."""
        if id(node) in self._known:
            known = self._known[id(node)]
            if known is None:
                raise self._error(node, "an alias stands inside the very value it refers to")
            return known
        self._known[id(node)] = None
        inner = [self.check(child) for child in _children(node)]
        nodes = 1 + sum(count for count, _ in inner)
        levels = 1 + max((depth for _, depth in inner), default=0)
        if nodes > MAX_NODES:
            raise self._error(node, f"expands to more than {MAX_NODES:,} keys and values, aliases counted as copies")
        if levels > MAX_DEPTH:
            raise self._error(node, f"nested too deeply; at most {MAX_DEPTH} levels are read")
        self._known[id(node)] = nodes, levels
        return nodes, levels

    def _error(self, node: Node, what: str) -> RecipeError:
        return RecipeError(f"{self._locate(node.start_mark.line, node.start_mark.column)}: {what}")


class _Reading:
    """Plain values from a measured node graph, noting where each stands."""

    def __init__(self, constructor: Any, locate: Locate) -> None:
        self._locate = locate
        self._scalars: dict[str, Callable[[Node], object]] = {
            f"{_CORE}null": constructor.construct_yaml_null,
            f"{_CORE}bool": constructor.construct_yaml_bool,
            f"{_CORE}int": constructor.construct_yaml_int,
            f"{_CORE}float": constructor.construct_yaml_float,
            # Text that only looks like a date, "=" or "<<" stays text.
            **{f"{_CORE}{kind}": lambda node: node.value for kind in ("str", "timestamp", "value", "merge")},
        }
        self.places: dict[Loc, Place] = {}

    def placed(self, node: Node, loc: Loc, *, key: Node) -> object:
        """The plain value of ``node``, whose way from the top is ``loc`` and whose name is written at ``key``."""
        self.places[loc] = Place(key=self._where(key), value=self._where(node))
        return self._value(node, loc)

    def _value(self, node: Node, loc: Loc) -> object:
        if isinstance(node, MappingNode) and node.tag == f"{_CORE}map":
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode) and node.tag == f"{_CORE}seq":
            return [self.placed(child, (*loc, index), key=child) for index, child in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in self._scalars:
            return self._scalar(node)
        tag = str(node.tag).replace(_CORE, "!!")
        raise RecipeError(f"{self._where(node)}: the tag {shown(tag)} means nothing in a recipe; leave it out")

    def _scalar(self, node: ScalarNode) -> object:
        try:
            return self._scalars[str(node.tag)](node)
        except (ValueError, KeyError, IndexError):
            kind = str(node.tag).removeprefix(_CORE)
            raise RecipeError(f"{self._where(node)}: {shown(node.value)} cannot be read as {kind}") from None

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, object]:
        own: dict[str, tuple[Node, Node]] = {}
        merged: list[Node] = []
        for key, child in node.value:
            if key.tag == f"{_CORE}merge":
                merged += child.value if isinstance(child, SequenceNode) else [child]
                continue
            if not isinstance(key, ScalarNode):
                raise RecipeError(f"{self._where(key)}: a key is a name, not a mapping or a list")
            if key.value in own:
                first = self._where(own[key.value][0])
                raise RecipeError(f"{self._where(key)}: the key {shown(key.value)} stands twice (first at {first})")
            own[key.value] = key, child
        inherited: dict[str, object] = {}
        for parent in reversed(merged):  # the first one named wins
            inherited |= self._inherited(parent, loc)
        return inherited | {name: self.placed(child, (*loc, name), key=key) for name, (key, child) in own.items()}

    def _inherited(self, parent: Node, loc: Loc) -> dict[str, object]:
        if not isinstance(parent, MappingNode):
            raise RecipeError(f"{self._where(parent)}: '<<' takes a mapping or a list of mappings")
        return self._mapping(parent, loc)

    def _where(self, node: Node) -> str:
        return self._locate(node.start_mark.line, node.start_mark.column)
