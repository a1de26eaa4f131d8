"""The public functions: load a recipe, plan a merge, run it into a directory or into memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, overload

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Unpack

from mergekit_lowrank.engine import (
    ARTEFACT_FILE,
    MemorySink,
    Plan,
    SettingsResolver,
    Sink,
    build_plan,
    default_memory_bytes,
    file_sink,
    open_inputs,
    run_plan,
    select_device,
)
from mergekit_lowrank.errors import MergeError, OutputError, raise_together
from mergekit_lowrank.events import Event, MergeFinished, MergeStarted, Reporter
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.formats import CONFIG_NAME, Adapter, config_text, new_directory, output_config, write_text
from mergekit_lowrank.recipe import Recipe, load_recipe, parse_recipe
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report import Digests, Report, background_digests, build_manifest, build_report, model_card

__all__ = ["MergedAdapter", "RecipeLike", "merge", "plan"]

RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path

TENSOR_FILE = "adapter_model.safetensors"
AnySink = TypeVar("AnySink", bound=Sink)


@dataclass(frozen=True, eq=False)
class MergedAdapter(Adapter):
    """An adapter in memory, as a merge made it.

    Attributes:
        report: what the merge did.
        artefacts: what the method returned beside the merged update, by ``<module>.<name>``; most return nothing.
    """

    report: Report
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)

    def fill(self, directory: Path) -> None:
        """The files of the adapter, and ``artefacts.safetensors`` where there are any."""
        super().fill(directory)
        if self.artefacts:
            save_file({name: tensor.contiguous() for name, tensor in self.artefacts.items()}, directory / ARTEFACT_FILE)


def plan(
    recipe: RecipeLike,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    strict: bool = False,
) -> Plan:
    """Everything a merge would do, from the headers of its inputs; no tensor is read.

    Args:
        recipe: a path, a mapping, or a ``Recipe``.
        registry: what there is to merge with; by default the built-ins and every installed plugin.
        memory_bytes: what the merge may hold; by default a quarter of the machine's memory.
        strict: whether a warning is an error.

    Raises:
        MergeError: every problem of the recipe, the inputs and the budget, together.
    """
    registry = registry or Registry.load()
    resolved = _as_recipe(recipe)
    settings = SettingsResolver(resolved, registry)
    inputs = open_inputs(resolved, registry, problems=settings.problems)
    budget = default_memory_bytes() if memory_bytes is None else memory_bytes
    made = build_plan(resolved, inputs, settings, memory_bytes=budget)
    if strict:
        _refuse_warnings(made.warnings)
    return made


class MergeOptions(TypedDict, total=False):
    """Keyword arguments of ``merge``, for type checkers; their meaning and defaults stand there."""

    registry: Registry | None
    memory_bytes: int | None
    device: str
    executor: str
    overwrite: bool
    hash_sources: bool
    strict: bool
    reporters: Sequence[Reporter]


@overload
def merge(recipe: RecipeLike, output: None = None, **options: Unpack[MergeOptions]) -> MergedAdapter: ...
@overload
def merge(recipe: RecipeLike, output: str | Path, **options: Unpack[MergeOptions]) -> Report: ...
def merge(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    device: str = "auto",
    executor: str = "threads",
    overwrite: bool = False,
    hash_sources: bool = True,
    strict: bool = False,
    reporters: Sequence[Reporter] = (),
) -> MergedAdapter | Report:
    """Merge the adapters of a recipe, into a directory or into memory.

    Args:
        recipe: a path, a mapping, or a ``Recipe``. In the latter two a model may be an ``Adapter`` in memory.
        output: the directory to make, in one step once everything in it is complete; None for a result in memory.
        registry: what there is to merge with; by default the built-ins and every installed plugin.
        memory_bytes: what the merge may hold; by default a quarter of the machine's memory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        executor: how modules are scheduled: ``threads``, ``serial``, or a plugin's.
        overwrite: whether an adapter at ``output`` may be replaced; it stays until the new one is complete.
        hash_sources: whether the manifest holds the SHA-256 of every source file.
        strict: whether a warning is an error.
        reporters: followers of the merge, beside those of plugins.

    Returns:
        The report of a merge into a directory, the ``MergedAdapter`` of one into memory.

    Raises:
        MergeError: what the recipe, the inputs, a plugin or the disk did wrong; nothing is left at ``output``.
    """
    registry = registry or Registry.load()
    start = time.perf_counter()
    made = plan(recipe, registry=registry, memory_bytes=memory_bytes, strict=strict)
    followers = _Followers([*reporters, *(cls() for cls in registry.reporters.values())])
    run = _Run(made, registry, select_device(device), registry.executor(executor)(), followers, strict, start)
    if output is None:
        return run.into_memory()
    _check_output(Path(output), made)
    return run.into_directory(Path(output), overwrite=overwrite, hash_sources=hash_sources)


class _Run:
    """One merge under way."""

    def __init__(
        self,
        made: Plan,
        registry: Registry,
        device: torch.device,
        executor: Executor,
        followers: _Followers,
        strict: bool,
        start: float,
    ) -> None:
        self._plan, self._registry, self._device, self._executor = made, registry, device, executor
        self._followers, self._strict, self._start = followers, strict, start

    def into_memory(self) -> MergedAdapter:
        with closing(self._followers):
            sink, report = self._run(MemorySink)
            self._followers.tell(MergeFinished(None, self._seconds()))
        return MergedAdapter(sink.state_dict, self._config(sink), report, sink.artefacts)

    def into_directory(self, output: Path, *, overwrite: bool, hash_sources: bool) -> Report:
        sources = [path for checkpoint in self._plan.inputs for path in checkpoint.files]
        with closing(self._followers):
            with (
                new_directory(output, overwrite=overwrite) as partial,
                background_digests(sources, enabled=hash_sources) as digests,
            ):
                report = self._fill(partial, output, digests)
            self._followers.tell(MergeFinished(str(output), self._seconds()))
        return report

    def _fill(self, partial: Path, output: Path, digests: Callable[[], Digests]) -> Report:
        """Everything the output holds, written into ``partial``."""
        sink, report = self._run(lambda plan: file_sink(partial / TENSOR_FILE, plan))
        method = self._registry.method(self._plan.recipe.merge_method)
        texts = {
            CONFIG_NAME: config_text(self._config(sink)),
            "README.md": model_card(self._plan, report, method, digests()),
            "recipe.yaml": _relative_to(output, self._plan).to_yaml(),
            "report.json": report.to_json(),
        }
        for name, text in texts.items():
            write_text(partial / name, text)
        outputs = {name: partial / name for name in (TENSOR_FILE, ARTEFACT_FILE, *texts) if (partial / name).exists()}
        manifest = build_manifest(self._plan, digests(), outputs)
        write_text(partial / "manifest.json", manifest)
        return report

    def _run(self, open_sink: Callable[[Plan], AnySink]) -> tuple[AnySink, Report]:
        tell = self._followers.tell
        tell(MergeStarted(len(self._plan.modules), self._plan.bytes_read))
        records, sink = run_plan(self._plan, open_sink, executor=self._executor, device=self._device, tell=tell)
        report = build_report(
            self._plan, records, sink.ranks, wall_seconds=self._seconds(), warnings=self._followers.warnings
        )
        if self._strict:
            _refuse_warnings(report.warnings)
        return sink, report

    def _config(self, sink: Sink) -> dict[str, object]:
        inputs = self._plan.inputs
        return output_config(
            base_model=self._plan.base_model,
            revision=_agreed(c.revision for c in inputs),
            task_type=_agreed(c.task_type for c in inputs),
            modules=[module.name for module in self._plan.modules],
            rank=max(sink.ranks.values()),
            fan_in_fan_out=any(c.fan_in_fan_out for c in inputs),
            rank_pattern=sink.ranks,
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._start


class _Followers:
    """The reporters of one merge. One that raises is heard no more, and the report says so; the merge goes on."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)
        self.warnings: list[str] = []

    def tell(self, event: Event) -> None:
        """Hand an event to every reporter."""
        self._each(lambda reporter: reporter.handle(event))

    def close(self) -> None:
        """The merge ended, well or not."""
        self._each(lambda reporter: reporter.close())

    def _each(self, call: Callable[[Reporter], None]) -> None:
        for reporter in tuple(self._reporters):
            try:
                call(reporter)
            except Exception as error:  # noqa: PERF203 - whatever a reporter does, it is not the merge's fault
                self._reporters.remove(reporter)
                name = getattr(reporter, "name", type(reporter).__name__)
                self.warnings.append(f"reporter '{name}' failed and was left out: {type(error).__name__}: {error}")


def _refuse_warnings(warnings: Sequence[str]) -> None:
    raise_together(
        [MergeError(f"{warning} (a warning, and warnings are errors under --strict)") for warning in warnings]
    )


def _as_recipe(recipe: RecipeLike) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(Path(recipe))


def _agreed(values: Iterable[str | None]) -> str | None:
    """The value that all inputs which give one agree on, else None."""
    given = {value for value in values if value}
    return given.pop() if len(given) == 1 else None


def _check_output(output: Path, made: Plan) -> None:
    target = output.resolve()
    for checkpoint in made.inputs:
        for directory in {path.parent.resolve() for path in checkpoint.files}:
            if target == directory or directory in target.parents:
                raise OutputError(
                    f"the output {output} lies in the input '{checkpoint.label}' ({directory}); "
                    "choose another directory"
                )
            if target in directory.parents:  # replacing it would delete the input
                raise OutputError(
                    f"the output {output} holds the input '{checkpoint.label}' ({directory}); choose another directory"
                )


def _relative_to(output: Path, made: Plan) -> Recipe:
    """The recipe with local paths written from the output directory, so that it runs again from there."""
    models = []
    for entry, checkpoint in zip(made.recipe.models, made.inputs, strict=True):
        path = checkpoint.files[0].parent if checkpoint.files else None
        local = path is not None and isinstance(entry.model, str) and (made.recipe.directory / entry.model).exists()
        models.append(entry.model_copy(update={"model": os.path.relpath(path, output)}) if local and path else entry)
    return made.recipe.model_copy(update={"models": tuple(models)})
