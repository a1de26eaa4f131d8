"""Rewrites the generated parts of the documentation: ``python docs/generate.py`` (``--check`` only compares).

A page holds ``<!-- generated: NAME ARGUMENT -->`` … ``<!-- end -->``; what stands between is made by the function
``NAME`` below from the models and the registry, so that no table can differ from the code. A console block after
``<!-- checked output -->`` holds one command and what it prints; the command is run, after those before it on the page,
in a directory with ``recipes/``, the models of ``tests/docs/models.py`` and the page's files (``<!-- file: NAME -->``).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.testing import CliRunner
from pydantic import BaseModel

import mergekit_lowrank
from mergekit_lowrank import Registry
from mergekit_lowrank.engine import ModuleRecord
from mergekit_lowrank.recipe import Energy, Execution, Filtered, ModelEntry, Output, Recipe, Retention, Rule
from mergekit_lowrank.report.results import InputSummary, Report, Totals
from mergekit_lowrank.spaces import ModuleShape, Space
from mergekit_lowrank.strategies import Preset, Strategy

DOCS = Path(__file__).resolve().parent
STRATEGIES = DOCS / "reference" / "strategies"
PLUGINS = DOCS.parent / "plugins"
CONSOLE = re.compile(
    r"(<!-- checked output -->\n```console\n\$ mergekit-lowrank (?P<line>.+)\n)(?P<output>(?:.*\n)*?)(```\n)"
)
"""A command and its output."""
FILE = re.compile(r"^<!-- file: (?P<name>[^\n]+) -->\n```\w+\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
"""A file that the page gives."""
VARYING = (r"\bin \d+\.\d s\b", r"[\d.]+ \wiB beside the modules", r"at most [\d.]+ \wiB")
"""What differs from run to run and from machine to machine: seconds, what threads hold, and the default of --memory."""
BLOCK = re.compile(r"(<!-- generated: (?P<call>[\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

RECIPE_PARTS = {
    model.__name__: model for model in (Recipe, ModelEntry, Output, Execution, Rule, Filtered, Retention, Energy)
}
REPORT_PARTS = {model.__name__: model for model in (Report, Totals, InputSummary)}
INT64_MAX = 2**63 - 1
SIDE, RANK, ADAPTERS = 4096, 16, 8
"""The module whose memory the table of methods states: rows and columns, and how many adapters of which rank."""
YES = {True: "yes", False: "no"}
TOLD_HERE = {
    "schema_version": "of this file",
    "method": "the recipe's",
    "inputs": "one entry for each model, below",
    "totals": "of the whole merge, below",
    "dtype": "the stored type",
    "warnings": "what a user should know",
    "modules": "of all inputs together: here one entry for each, in `totals` their number",
    "bytes_read": "of the inputs' factors",
    "bytes_written": "of the merged factors",
    "wall_seconds": "of the whole merge",
}
"""Fields of the report whose models say nothing about them."""


def main(arguments: Sequence[str]) -> int:
    """Rewrite every page, or name the stale ones."""
    made = {page: rewritten(page) for page in pages()}
    stale = {page: text for page, text in made.items() if text != page.read_text(encoding="utf-8")}
    for page, text in stale.items():
        print(page.relative_to(DOCS.parent), "is stale" if "--check" in arguments else "rewritten")
        if "--check" not in arguments:
            page.write_text(text, encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


def pages() -> list[Path]:
    """Every page of the documentation, and README.md."""
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def rewritten(page: Path) -> str:
    """The text of a page with its generated blocks made anew."""

    def fill(match: re.Match[str]) -> str:
        name, *arguments = match["call"].split()
        return f"{match[1]}\n{GENERATORS[name](*arguments)}\n\n{match[3]}"

    text = BLOCK.sub(fill, page.read_text(encoding="utf-8"))
    if not CONSOLE.search(text):
        return text
    with working_directory() as directory:
        for file in FILE.finditer(text):
            (directory / file["name"]).parent.mkdir(parents=True, exist_ok=True)
            (directory / file["name"]).write_text(file["text"], encoding="utf-8")
        return CONSOLE.sub(_with_output, text)


@contextmanager
def working_directory() -> Iterator[Path]:
    """A temporary directory that holds ``recipes`` like a clone does, and small models; the process works in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "recipes").symlink_to(DOCS.parent / "recipes")
        runpy.run_path(str(DOCS.parent / "tests" / "docs" / "models.py"))["write_models"](Path(directory))
        os.chdir(directory)
        try:
            yield Path(directory)
        finally:
            os.chdir(before)


def _with_output(match: re.Match[str]) -> str:
    from mergekit_lowrank.cli import main as program

    output = CliRunner().invoke(program, shlex.split(match["line"]), prog_name="mergekit-lowrank").output
    lines = "".join(f"{line.rstrip()}\n" for line in output.splitlines())
    return match[1] + (match["output"] if _stable(match["output"]) == _stable(lines) else lines) + match[4]


def _stable(output: str) -> str:
    for pattern in VARYING:
        output = re.sub(pattern, "", output)
    return output


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def recipe_keys(part: str) -> str:
    """The keys of one part of the recipe."""
    model = RECIPE_PARTS[part]
    schema = model.model_json_schema()
    return table(
        ("key", "values", "default", "meaning"),
        (
            (f"`{name}`", values(schema["properties"][name], schema), default(schema, name), _sentence(field))
            for name, field in model.model_fields.items()
        ),
    )


@cache
def registry() -> Registry:
    """The built-ins and this repository's plugins, from their sources: the same whether they are installed or not."""
    found = Registry()
    for project in sorted(PLUGINS.glob("*/pyproject.toml")):
        found.register(_module_of(project.parent), project.parent.name, distribution=project.parent.name)
    return found


def _module_of(distribution: Path) -> ModuleType:
    """The module that a plugin's entry point names: that of the distribution, with underscores."""
    sys.path.insert(0, str(distribution))
    try:
        return importlib.import_module(distribution.name.replace("-", "_"))
    finally:
        sys.path.remove(str(distribution))


def parameters(method: str) -> str:
    """The parameters of a strategy or preset, with the defaults that the preset sets."""
    preset = registry().method(method)
    return parameter_table(preset.strategy.Params, preset.parameters)


def space_parameters(space: str) -> str:
    """The parameters of a space."""
    return parameter_table(Registry().space(space).Params, {})


def parameter_table(model: type[BaseModel], fixed: Mapping[str, Any]) -> str:
    """Name, values, default and meaning of each field."""
    schema = model.model_json_schema()
    per_input = model.per_input_names() if hasattr(model, "per_input_names") else frozenset()
    rows = []
    for name, field in model.model_fields.items():
        shown = f"`{_plain(fixed[name])}`" if name in fixed else default(schema, name)
        per_model = " May be given per model." if name in per_input else ""
        rows.append((f"`{name}`", values(schema["properties"][name], schema), shown, _sentence(field) + per_model))
    return table(("parameter", "values", "default", "meaning"), rows)


def methods(distribution: str) -> str:
    """What each method of a distribution does, where it works and where it comes from."""
    return table(
        ("method", "what it does", "spaces (default first)", "source"),
        (
            (_linked(name), preset.summary, _spaces_of(preset), preset.paper)
            for name, preset in registry().methods.items()
            if registry().owner("strategies", name) == distribution
        ),
    )


def plugin_methods() -> str:
    """What each of this repository's plugins adds."""
    names = [record.distribution for record in registry().plugins[1:]]
    return "\n\n".join(f"### {name}\n\n{methods(name)}" for name in names)


def method_parameters() -> str:
    """The defaults of every method; of a preset what it sets."""
    return table(
        ("method", "parameters and their defaults"),
        ((f"`{preset.name}`", _defaults(preset) or "-") for preset in registry().methods.values()),
    )


def method_properties() -> str:
    """What every method asks for and promises."""
    return table(
        ("method", "models", "one model comes back", "order-free", "random", "`output.rank`", "memory"),
        (
            (
                f"`{preset.name}`",
                _models(preset.strategy),
                _identity(preset),
                YES[preset.strategy.is_order_free],
                YES[preset.strategy.is_random],
                f"`{preset.default_rank}`",
                _memory(preset),
            )
            for preset in registry().methods.values()
        ),
    )


def strategy_pages() -> str:
    """A list of links to the pages of methods, each called as its heading calls it."""
    names: dict[Path, list[str]] = {}
    for name, page in pages_of_methods().items():
        names.setdefault(page, []).append(name)
    return "\n".join(
        f"* [{', '.join(own)}]({page.relative_to(DOCS).as_posix()})" for page, own in sorted(names.items())
    )


@cache
def pages_of_methods() -> dict[str, Path]:
    """The page of each method that has one: its title names it."""
    titles = {page: page.read_text(encoding="utf-8").partition("\n")[0] for page in sorted(STRATEGIES.glob("*.md"))}
    named = {name: page for page, title in titles.items() for name in re.findall(r"`(\w+)`", title)}
    return {name: named[name] for name in registry().methods if name in named}


def _linked(method: str) -> str:
    page = pages_of_methods().get(method)
    return f"[`{method}`]({page.name})" if page else f"`{method}`"


def _is_preset(preset: Preset) -> bool:
    return preset.name != preset.strategy.name


def _defaults(preset: Preset) -> str:
    if _is_preset(preset):
        fixed = {"space": preset.space} if preset.space else {}
        return f"`{preset.strategy.name}` with " + _listed({**fixed, **preset.parameters})
    own = {name: field.default for name, field in preset.strategy.Params.model_fields.items()}
    return _listed({**own, **preset.strategy.space_defaults})


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}: {_plain(value)}`" for name, value in values.items())


def _strategy(preset: Preset, **parameters: Any) -> Strategy:
    """The strategy of a preset, with its defaults but for these parameters."""
    fields = preset.strategy.Params.model_fields
    chosen = {name: value for name, value in {**preset.parameters, **parameters}.items() if name in fields}
    return preset.strategy(preset.strategy.Params(**chosen))


def _models(strategy: type[Strategy]) -> str:
    least, most = strategy.min_inputs, strategy.max_inputs
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _identity(preset: Preset) -> str:
    """Whether one input at weight 1 comes back: always, at density 1, or not."""
    if preset.strategy.min_inputs > 1:
        return "-"
    if _strategy(preset).returns_single_input():
        return "yes"
    has_density = "density" in preset.strategy.Params.model_fields
    return "`density: 1`" if has_density and _strategy(preset, density=1.0).returns_single_input() else "no"


def _memory(preset: Preset) -> str:
    """What the method holds in its default space for the example module, in float32."""
    adapters = min(ADAPTERS, preset.strategy.max_inputs or ADAPTERS)
    entries = _strategy(preset).working_entries(ModuleShape(SIDE, SIDE, (RANK,) * adapters), _space(preset))
    return f"{entries * 4 / 2**20:.0f} MiB"


def _space(preset: Preset) -> Space:
    """The default space of a method, with what the method changes."""
    space = registry().space(registry().spaces_of(preset)[0])
    changed = {**preset.strategy.space_defaults, **preset.parameters}
    return space(space.Params(**{name: value for name, value in changed.items() if name in space.Params.model_fields}))


def presets(*strategies: str) -> str:
    """Every preset, or those of some strategies, and what it stands for."""
    rows = []
    for name, preset in registry().methods.items():
        if _is_preset(preset) and (not strategies or preset.strategy.name in strategies):
            fixed = _listed(preset.parameters)
            space = f"`space: {preset.space}` (fixed)" if preset.space else ""
            rank = f"`output.rank: {preset.rank}`" if preset.rank else ""
            rows.append((f"`{name}`", f"`{preset.strategy.name}`", "; ".join(filter(None, (space, fixed, rank)))))
    return table(("preset", "method", "sets"), rows)


def _takes_dense(preset: Preset) -> bool:
    return preset.takes_dense and any(registry().spaces[name].takes_dense for name in registry().spaces_of(preset))


def properties(method: str) -> str:
    """What the class of a method declares."""
    preset = registry().method(method)
    rows = [
        ("spaces (default first)", _spaces_of(preset)),
        ("models", _models(preset.strategy)),
        ("takes full fine-tunes", YES[_takes_dense(preset)]),
        ("one model at weight 1 comes back", _identity(preset)),
        ("draws random numbers", YES[preset.strategy.is_random]),
        ("permuted inputs give the same result, to rounding", YES[preset.strategy.is_order_free]),
    ]
    return table(("property", "value"), rows)


def spaces() -> str:
    """Every built-in space."""
    return table(("space", "coordinates"), ((f"`{n}`", space.summary) for n, space in Registry().spaces.items()))


def executors() -> str:
    """Every built-in executor."""
    return table(("executor", "what it does"), ((f"`{n}`", e.summary) for n, e in Registry().executors.items()))


def formats() -> str:
    """Every format that is read or written, by whom and what it is."""
    known = registry()
    names = [name for name in ("peft", "model", *sorted({*known.formats, *known.writers})) if name in known.formats]
    names += [name for name in sorted(known.writers) if name not in known.formats]
    return table(
        ("format", "read", "written", "what it is", "from"),
        (
            (
                f"`{name}`",
                YES[name in known.formats],
                YES[name in known.writers],
                (known.formats.get(name) or known.writers[name]).summary,
                f"`{known.owner('formats' if name in known.formats else 'writers', name)}`",
            )
            for name in dict.fromkeys(names)
        ),
    )


def variants() -> str:
    """What becomes of one example of each kind of checkpoint: made, merged, converted and compared here and now."""
    sys.path.insert(0, str(DOCS.parent))
    try:
        examples = importlib.import_module("tests.docs.variants")
    finally:
        sys.path.remove(str(DOCS.parent))
    return table(examples.COLUMNS, examples.table_rows(registry()))


def report_fields(part: str) -> str:
    """The fields of one part of report.json."""
    model = REPORT_PARTS[part]
    return table(
        ("field", "meaning"),
        ((f"`{name}`", field.description or TOLD_HERE[name]) for name, field in model.model_fields.items()),
    )


def module_fields() -> str:
    """The fields of one entry of ``modules`` in report.json, from the docstring of the record."""
    told = attributes(ModuleRecord)
    rows = [(f"`{field.name}`", told[field.name]) for field in dataclasses.fields(ModuleRecord)]
    return table(("field", "meaning"), [*rows, ("`written_rank`", "rows of A in the file, padding included")])


def errors() -> str:
    """The error classes."""
    from mergekit_lowrank import errors as module

    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, Exception)]
    first = sorted(classes, key=lambda cls: inspect.getsourcelines(cls)[1])
    return table(("error", "what it says"), ((f"`{cls.__name__}`", inspect.getdoc(cls) or "") for cls in first))


def public_names() -> str:
    """Every name of the package, with the first line of its documentation."""
    rows = []
    for name in mergekit_lowrank.__all__:
        doc = inspect.getdoc(getattr(mergekit_lowrank, name)) or ""
        if name.startswith("__"):
            doc = "The version."
        elif name == "hookimpl":
            doc = "Marks a function or method as the implementation of a hook."
        rows.append((f"`{name}`", doc.splitlines()[0].replace("``", "`")))
    return table(("name", "what it is"), rows)


def commands() -> str:
    """Every command of the command line, with its arguments and options."""
    from mergekit_lowrank.cli import main as program

    context = click.Context(program, info_name="mergekit-lowrank", **program.context_settings)
    return "\n\n".join(_command(program, context))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    name = context.command_path
    if context.parent is not None:
        yield f"## {name.partition(' ')[2]}"
        yield inspect.cleandoc(command.help or "").partition("\n\n")[0].replace("\n", " ")
    usage = " ".join([name, *command.collect_usage_pieces(context)]).strip()
    yield f"```text\n{usage}\n```"
    records = [found for option in command.get_params(context) if (found := option.get_help_record(context))]
    if records:
        yield table(("option", "meaning"), ((f"`{option}`", re.sub(r"\s+", " ", text)) for option, text in records))
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            if found is not None and not found.hidden:
                yield from _command(found, click.Context(found, parent=context, info_name=sub))


def values(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "$ref" in schema:
        return _referenced(schema["$ref"], root)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [values(option, root) for option in schema[key] if option.get("type") != "null"]
            return " | ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if isinstance(kind, list):
        return "size"
    if kind == "array":
        return f"list of {values(schema['items'], root)}"
    if kind == "object":
        return "mapping"
    words = {"boolean": "`true` | `false`", "integer": "whole number", "number": "number", "string": "text"}
    return words[str(kind)] + _bounds(schema)


def _referenced(reference: str, root: Mapping[str, Any]) -> str:
    name = reference.rpartition("/")[2]
    fields = root["$defs"][name]["properties"]
    if len(fields) == 1:
        (key, field), *_ = fields.items()
        return f"`{{{key}: k}}`, k{_bounds(field)}"
    return {"ModelEntry": "models", "Rule": "rules", "Filtered": "`{filter, value}`"}.get(name, "mapping")


def _bounds(schema: Mapping[str, Any]) -> str:
    parts = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in schema and abs(schema[key]) < INT64_MAX
    ]
    return f" {', '.join(parts)}" if parts else ""


def default(schema: Mapping[str, Any], name: str) -> str:
    """The default of a field, or that there is none."""
    if name in schema.get("required", ()):
        return "required"
    value = schema["properties"][name].get("default")
    return "-" if value in (None, {}, []) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sentence(field: Any) -> str:
    text = field.description or ""
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."


def _spaces_of(preset: Preset) -> str:
    return ", ".join(f"`{name}`" for name in registry().spaces_of(preset))


def attributes(cls: type) -> dict[str, str]:
    """The ``Attributes:`` section of a docstring, by name."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("``", "`") for name, text in entries}


GENERATORS: dict[str, Callable[..., str]] = {
    "commands": commands,
    "errors": errors,
    "executors": executors,
    "formats": formats,
    "method-parameters": method_parameters,
    "method-properties": method_properties,
    "methods": methods,
    "module-fields": module_fields,
    "parameters": parameters,
    "plugin-methods": plugin_methods,
    "presets": presets,
    "properties": properties,
    "public-names": public_names,
    "recipe-keys": recipe_keys,
    "report-fields": report_fields,
    "space-parameters": space_parameters,
    "spaces": spaces,
    "strategy-pages": strategy_pages,
    "variants": variants,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
