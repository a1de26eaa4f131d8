"""The tokenizer of an output: that of the inputs where they agree, chat template included; else the one asked for."""

from __future__ import annotations

import fnmatch
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lowrank.errors import CheckpointError, IncompatibleInputsError, RecipeError, nearest_name
from mergekit_lowrank.formats.base import Checkpoint
from mergekit_lowrank.formats.directory import writing

__all__ = [
    "TOKENIZER_FILES",
    "TokenizerSource",
    "agreed_tokenizer",
    "copy_tokenizer",
    "is_tokenizer_file",
    "tokenizer_files",
]

_ALL_IN_ONE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_REPEATED = ("special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
"""What ``tokenizer.json`` and the configuration say as well, so that it may be lacking beside them."""

TOKENIZER_FILES = (_ALL_IN_ONE, _CONFIG, "normalizer.json", *_REPEATED, *_TEMPLATES)
"""Patterns of the files that transformers writes of a tokenizer (5.23; older ones wrote more of them)."""

_WHERE_FROM = (
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "is_local",
    "local_files_only",
    "transformers_version",
    "_commit_hash",
)
"""Keys of the configuration that say where a tokenizer was loaded from, and nothing of what it does."""

_IGNORED = (*_WHERE_FROM, "chat_template")  # templates are compared by themselves

_SHOWN = 3
_ABSENT = object()


@dataclass(frozen=True)
class TokenizerSource:
    """A directory that may hold a tokenizer.

    Attributes:
        label: what messages and ``tokenizer_source`` call it; ``base`` for the base model.
        directory: None for an adapter in memory, which has none.
        location: as the recipe gave it, which ``tokenizer_source`` may say too.
    """

    label: str
    directory: Path | None
    location: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TokenizerSource:
        """That of an input."""
        directory = checkpoint.files[0].parent if checkpoint.files else None
        return cls(checkpoint.label, directory, checkpoint.location)

    @property
    def files(self) -> dict[str, Path]:
        """Its files, as ``tokenizer_files`` lists them."""
        return tokenizer_files(self.directory) if self.directory else {}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, relative to the model's directory and with ``/``, belongs to a tokenizer."""
    return any(
        fnmatch.fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES if pattern.count("/") == name.count("/")
    )


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """The files of the tokenizer in a directory by their path in it, sorted; empty where there is none."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    return {path.relative_to(directory).as_posix(): path for path in sorted(found)}


def agreed_tokenizer(sources: Sequence[TokenizerSource], chosen: str | None = None) -> dict[str, Path]:
    """The files of the tokenizer to write, by their path in the output; empty where no source has one.

    Sources agree whose JSON says the same (where it was loaded from apart), whose other files are equal to the byte,
    and whose chat templates are equal wherever they stand. A source without any of the files has no say. Of those
    that agree the first one's files are taken.

    Args:
        sources: the base model first, where its tokenizer counts, then the inputs.
        chosen: the recipe's ``tokenizer_source``: a label or location of one source, whose files are then taken.

    Raises:
        IncompatibleInputsError: they do not agree and none is chosen; what differs is shown.
        RecipeError: there is no source of the chosen name, or it is mergekit's ``union``.
        CheckpointError: the chosen one has no tokenizer, or a file cannot be read.
    """
    if chosen is not None:
        return _chosen(sources, chosen)
    holders = [source for source in sources if source.files]
    differences = [_told(holders[0], other) for other in holders[1:]]
    told = [difference for difference in differences if difference]
    if told:
        names = ", ".join("base" if source.label == "base" else f"'{source.label}'" for source in holders)
        raise IncompatibleInputsError(
            f"the tokenizers differ. {'. '.join(told)}. Set tokenizer_source to the one to keep: {names}."
        )
    return holders[0].files if holders else {}


def copy_tokenizer(files: Mapping[str, Path], directory: Path) -> None:
    """Copy the files of a tokenizer, by their path in it, into a directory.

    Raises:
        CheckpointError: one cannot be read any more.
        DiskError: the disk is full or failed.
    """
    for name, path in files.items():
        data = _read(path)
        with writing(directory / name):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)


def _chosen(sources: Sequence[TokenizerSource], chosen: str) -> dict[str, Path]:
    if chosen == "union":
        raise RecipeError(
            "'union' would give tokens new rows in the embeddings, which a merge of updates does not make; train the "
            "inputs with one tokenizer, or name the base or the model whose tokenizer is to be written"
        )
    source = next((source for source in sources if chosen in (source.label, source.location)), None)
    labels = [source.label for source in sources]
    if source is None:
        if chosen == "base":
            advice = "the base model is no directory here, so it has no tokenizer; name that directory under base_model"
            raise RecipeError(f"{advice}, or take one of {', '.join(labels)}")
        nearest = nearest_name(chosen, labels)
        hint = f" (did you mean '{nearest}'?)" if nearest else ""
        raise RecipeError(
            f"expected base or a model of the recipe{hint}, found '{chosen}'; there are {', '.join(labels)}"
        )
    if not source.files:
        raise CheckpointError(
            f"'{source.label}' has no tokenizer: none of {_ALL_IN_ONE}, {_CONFIG}, vocab*, *.model lies in "
            f"{source.directory or 'memory'}. Name one that has it as tokenizer_source, or leave that out."
        )
    return source.files


def _told(first: TokenizerSource, other: TokenizerSource) -> str:
    """What differs between two tokenizers, the first few of it; empty where nothing does."""
    found = list(_differences(_Facts(first.files), _Facts(other.files)))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listing = "; ".join(f"{where}: {_short(a)} and {_short(b)}" for where, a, b in found[:_SHOWN])
    return f"'{first.label}' and '{other.label}': {listing}{more}" if found else ""


class _Facts:
    """What the files of a tokenizer say.

    Attributes:
        files: those that are compared, by name.
        templates: its chat templates, by name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = {name: path for name, path in files.items() if not _is_any(name, _TEMPLATES)}
        self.templates: dict[str, str] = {}
        for name in (_CONFIG, "chat_template.json"):
            self.templates |= _stored_templates(files[name]) if name in files else {}
        for name, path in files.items():
            if path.suffix == ".jinja":
                key = "default" if name == _TEMPLATES[0] else path.stem
                self.templates[key] = _read(path).decode(errors="replace")

    def repeats(self, name: str) -> bool:
        """Whether a file says only what others do, so that it may be lacking."""
        return _ALL_IN_ONE in self.files and _is_any(name, _REPEATED)


_Difference = tuple[str, object, object]


def _differences(one: _Facts, other: _Facts) -> Iterator[_Difference]:
    """Where two tokenizers differ, and what each says there."""
    for name in sorted({*one.files, *other.files}):
        if name in one.files and name in other.files:
            yield from _in_file(name, _read(one.files[name]), _read(other.files[name]))
        elif not (one.repeats(name) and other.repeats(name)):
            yield name, _presence(name, one), _presence(name, other)
    yield from _in_values("chat template", one.templates, other.templates)


def _presence(name: str, side: _Facts) -> object:
    return "a file" if name in side.files else _ABSENT


def _in_file(name: str, one: bytes, other: bytes) -> Iterator[_Difference]:
    if one == other:
        return
    try:
        a, b = (_object(data, _IGNORED if name == _CONFIG else ()) for data in (one, other))
        found = list(_in_values(name, a, b))
    except (ValueError, RecursionError):  # it is no JSON, or nested without end
        found = [(name, f"{len(one)} bytes", f"{len(other)} bytes")]
    yield from found


def _in_values(where: str, one: Any, other: Any) -> Iterator[_Difference]:
    """The innermost values that differ, with the way to them."""
    one, other = _by_content(one), _by_content(other)
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((_key(key), one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in _differing(one, other))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        both = enumerate(zip(one, other, strict=True))
        pairs = ((f"[{index}]", a, b) for index, (a, b) in both if a != b)
    else:
        if one != other:
            yield where, one, other
        return
    for step, a, b in pairs:
        yield from _in_values(f"{where} {step}", a, b)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """Keys of what differs: a vocabulary has hundreds of thousands that do not."""
    return (key for key in dict.fromkeys((*one, *other)) if one.get(key, _ABSENT) != other.get(key, _ABSENT))


def _by_content(value: Any) -> Any:
    """A list of tokens as a mapping from their text; anything else as it is."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(e, dict) and isinstance(e.get("content"), str) for e in value)
    ):
        return {entry["content"]: entry for entry in value}
    return value


def _object(data: bytes, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object without some of its keys."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("expected an object")  # noqa: TRY004 - as for what is no JSON at all
    return {key: value for key, value in found.items() if key not in ignored}


def _stored_templates(path: Path) -> dict[str, str]:
    """Chat templates in a JSON file by name; transformers writes one text, or a list of {name, template}."""
    try:
        stored = _object(_read(path)).get("chat_template")
    except (ValueError, RecursionError):  # compared as bytes
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    entries = stored if isinstance(stored, list) else []
    return {str(e.get("name")): str(e.get("template")) for e in entries if isinstance(e, dict)}


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _key(key: str) -> str:
    return key if key.isidentifier() else _short(key)


def _short(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 40
    return short.repr(value)
