"""Two merges beside each other: what was asked differently, and how far apart the results are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lowrank.pages import Lines, html_table, number
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.distances import Distances
from mergekit_lowrank.report.figures import figures_of
from mergekit_lowrank.report.outputs import MergeOutput, counted, named
from mergekit_lowrank.report.results import Totals

__all__ = [
    "SCHEMA_VERSION",
    "ComparedInput",
    "ComparedMerge",
    "ComparedModule",
    "ComparedSpectra",
    "Difference",
    "MergeComparison",
    "Written",
    "compare_merges",
]

SCHEMA_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparedMerge(_Frozen):
    """One of the two merges."""

    location: str = Field(description="its directory, as given")
    method: str = Field(description="the recipe's merge_method")
    kind: str = Field(description="`adapter` or `model`")
    format: str = Field(description="the dialect that an adapter is written in")
    rank: str = Field(description="in words: one, several, or whole updates")
    dtype: str = Field(description="of the stored factors")
    base_models: tuple[str, ...] = Field(description="those that its inputs name")
    totals: Totals = Field(description="as in its report.json")


class Difference(_Frozen):
    """A key of the recipe that is not the same in both."""

    key: str = Field(description="such as `parameters.density` or `models[spam].parameters.weight`")
    a: str | None = Field(description="its value in A, as JSON where it is no text; null where A has none")
    b: str | None = Field(description="the same of B")


class ComparedInput(_Frozen):
    """One input of either merge, by its label."""

    label: str
    a_norm: float | None = Field(description="‖w·ΔW‖_F over the modules of A; null where A has no such input")
    b_norm: float | None = Field(description="the same of B")
    is_same: bool | None = Field(description="whether both merged the same files, by SHA-256; null where not known")


class Written(_Frozen):
    """What one merge wrote of a module; the fields are those of report.json."""

    written_rank: int | None
    merged_norm: float
    kept_energy: float
    relative_error: float | None


class ComparedModule(_Frozen):
    """One module of either merge."""

    module: str = Field(description="its name in the base model")
    a: Written | None = Field(description="null where A has no such module")
    b: Written | None = Field(description="the same of B")
    distance: float | None = Field(
        description="‖M_A − M_B‖_F / ‖M_A‖_F as stored, 0 for equal factors; null where not measured, or A is zero"
    )
    cosine: float | None = Field(description="<M_A, M_B> / (‖M_A‖·‖M_B‖); null where not measured, or one is zero")


class ComparedSpectra(_Frozen):
    """Singular values of one module type."""

    kind: str = Field(description="what follows the layer's number in the names of its modules")
    a: tuple[float, ...] = Field(description="at k, the root mean square of σ_k over its modules, before the cut")
    b: tuple[float, ...] = Field(description="the same of B")


class MergeComparison(_Frozen):
    """Two merges, A and B. Distances are exact: from the stored factors, in float64."""

    schema_version: int = Field(SCHEMA_VERSION, description="of this file; a higher one may lack or rename fields")
    a: ComparedMerge
    b: ComparedMerge
    recipe: tuple[Difference, ...] = Field(description="what their recipes say differently, defaults included")
    inputs: tuple[ComparedInput, ...] = Field(description="of either")
    distance: float | None = Field(description="‖M_A − M_B‖_F / ‖M_A‖_F over the modules that were measured")
    cosine: float | None = Field(description="of these modules taken together")
    remarks: tuple[str, ...] = Field(description="what cannot be compared, and why")
    modules: tuple[ComparedModule, ...] = Field(description="of either, in the order of A")
    spectra: tuple[ComparedSpectra, ...] = Field(description="of module types that both have, where both know them")

    def to_json(self) -> str:
        """The comparison as indented JSON."""
        return self.model_dump_json(indent=1) + "\n"

    def _repr_html_(self) -> str:
        """For notebooks: the key numbers, and what the recipes say differently."""
        sides = (f"A: {self.a.location}", f"B: {self.b.location}")
        tables = [html_table(("", *sides), self.facts())]
        if self.recipe:
            rows = [(own.key, own.a, own.b) for own in self.recipe]
            tables.append(html_table(("recipe", *sides), rows))
        return "\n".join(tables)

    def facts(self) -> list[tuple[str, str, str]]:
        """What a table of both says first: a name, and the value of each."""
        return [(name, own, its) for (name, own), (_, its) in zip(_facts(self.a), _facts(self.b), strict=True)]


def _facts(own: ComparedMerge) -> Iterator[tuple[str, str]]:
    totals = own.totals
    yield "method", own.method
    yield "output", ", ".join([own.format if own.kind == "adapter" else own.kind, own.rank, own.dtype])
    yield "mean norm of the inputs", number(totals.mean_input_norm)
    yield "modules", str(totals.modules)
    yield "merged norm", number(totals.merged_norm)
    yield "energy kept", number(100 * totals.kept_energy, "%")
    yield "largest cut error", number(totals.largest_cut_error)
    yield "largest error against Σ w·ΔW", number(totals.largest_relative_error)


def compare_merges(a: str | Path, b: str | Path, *, registry: Registry | None = None) -> MergeComparison:
    """Two outputs of ``merge`` beside each other.

    Where both hold adapters that can be read, every module of both is read, one at a time, for its distance. Anything
    that differs in kind (bases, modules, shapes, files of an input) is a remark.

    Args:
        a: the directory of one.
        b: that of the other.
        registry: opens the adapters; by default with every installed plugin.

    Raises:
        CheckpointError: one is not the output of a merge, is of another version of this package, or is damaged.
        RecipeError: a ``recipe.yaml`` there is not valid.
    """
    one, other = MergeOutput.read("A", Path(a)), MergeOutput.read("B", Path(b))
    distances = Distances(one, other, registry or Registry.load())
    modules = tuple(_modules(one, other, distances))
    return MergeComparison(
        a=_side(one, str(a)),
        b=_side(other, str(b)),
        recipe=tuple(_differences(one, other)),
        inputs=tuple(_inputs(one, other)),
        distance=distances.total.relative,
        cosine=distances.total.cosine,
        remarks=(*_remarks(one, other), *distances.remarks),
        modules=modules,
        spectra=tuple(_spectra(one, other)),
    )


def _modules(one: MergeOutput, other: MergeOutput, distances: Distances) -> Iterator[ComparedModule]:
    a, b = one.modules, other.modules
    for name in dict.fromkeys([*a, *b]):
        distance, cosine = distances.of(name)
        yield ComparedModule(
            module=name, a=_written(a.get(name)), b=_written(b.get(name)), distance=distance, cosine=cosine
        )


def _side(own: MergeOutput, location: str) -> ComparedMerge:
    report = own.report
    return ComparedMerge(
        location=location,
        method=report.method,
        kind=report.kind,
        format=report.format,
        rank=report.rank_text,
        dtype=report.dtype,
        base_models=own.base_models,
        totals=report.totals,
    )


def _inputs(one: MergeOutput, other: MergeOutput) -> Iterator[ComparedInput]:
    a, b = ({summary.label: summary.weighted_norm for summary in own.report.inputs} for own in (one, other))
    for label in dict.fromkeys([*a, *b]):
        is_known = label in one.hashes and label in other.hashes
        is_same = one.hashes[label] == other.hashes[label] if is_known else None
        yield ComparedInput(label=label, a_norm=a.get(label), b_norm=b.get(label), is_same=is_same)


def _remarks(one: MergeOutput, other: MergeOutput) -> Iterator[str]:
    if one.base_models != other.base_models:
        bases = " and ".join(f"{own.name} names {', '.join(own.base_models) or 'none'}" for own in (one, other))
        yield f"The base models differ: {bases}. Updates of different bases do different things, however near they are."
    changed = [own.label for own in _inputs(one, other) if own.is_same is False]
    if changed:
        yield f"Of the same name but not the same files: {named(changed)}."
    for own, lacking in ((one, other), (other, one)):
        only = [name for name in own.modules if name not in lacking.modules]
        if only:
            yield f"{counted(only)} in {own.name} only: {named(only)}."


def _differences(one: MergeOutput, other: MergeOutput) -> Iterator[Difference]:
    a, b = dict(_flat(_document(one))), dict(_flat(_document(other)))
    for key in dict.fromkeys([*a, *b]):
        own, its = a.get(key), b.get(key)
        if own != its and not (key.endswith((".model", "base_model")) and _is_one_path(one, own, other, its)):
            yield Difference(key=key, a=own, b=its)


def _document(own: MergeOutput) -> dict[str, Any]:
    """The recipe as plain data, its models under their labels."""
    data = own.recipe.model_dump(mode="json", exclude={"execution", "sweep"})
    models = zip(own.report.inputs, data.pop("models"), strict=True)
    return {"merge_method": data.pop("merge_method"), "models": {f"[{t.label}]": entry for t, entry in models}, **data}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Leaves as (key, JSON); what is null or empty is left out, as recipes leave it out."""
    if isinstance(value, dict) and value:
        for name, own in value.items():
            yield from _flat(own, f"{key}{name}" if name.startswith("[") else f"{key}.{name}".removeprefix("."))
    elif value not in (None, {}, []):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_one_path(one: MergeOutput, own: str | None, other: MergeOutput, its: str | None) -> bool:
    """Whether both are the same path, each from its recipe's directory."""
    if own is None or its is None:
        return False
    paths = [(place.recipe.directory / path).resolve() for place, path in ((one, own), (other, its))]
    return paths[0] == paths[1]


def _spectra(one: MergeOutput, other: MergeOutput) -> Iterator[ComparedSpectra]:
    a, b = _merged_spectra(one), _merged_spectra(other)
    for kind in a:
        if kind in b:
            yield ComparedSpectra(kind=kind, a=a[kind], b=b[kind])


def _merged_spectra(own: MergeOutput) -> dict[str, tuple[float, ...]]:
    """By module type, those that the merge's own page draws."""
    lines = [figure for figure in figures_of(own.report) if isinstance(figure, Lines)]
    return {figure.title: series.values for figure in lines for series in figure.series if series.is_emphasised}


def _written(module: Mapping[str, Any] | None) -> Written | None:
    return None if module is None else Written(**{name: module[name] for name in Written.model_fields})
