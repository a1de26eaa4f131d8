"""What lies in an output beside its manifest, its report, and the same merge made again."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine import PACKAGES, Device, Plan
from mergekit_lowrank.errors import CheckpointError, DiskError, InterruptedMergeError, MemoryBudgetError, MergeError
from mergekit_lowrank.events import Event
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.formats import INDEX_NAME, REPORT_NAME
from mergekit_lowrank.recipe import Recipe, load_recipe
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.manifest import Manifest
from mergekit_lowrank.requests import plans_of
from mergekit_lowrank.verification.contents import Contents, Said, read_contents
from mergekit_lowrank.verification.hashing import (
    RECIPE_NAME,
    Hashed,
    check_outputs,
    check_sources,
    refuse_devices,
    require_local,
    without_advice,
)
from mergekit_lowrank.verification.recomputing import Compared, recompute
from mergekit_lowrank.verification.results import Fault, Verification
from mergekit_lowrank.verification.sweeps import beside_variants, faults_of_variant, read_index

__all__ = ["Means", "verification_of"]


@dataclass(frozen=True, eq=False)
class Means:
    """What a verification may use.

    Attributes:
        registry: what the output was merged with.
        executor: how modules are scheduled.
        devices: where they are merged.
        memory_bytes: what may be held; None for a quarter of the machine's memory.
        vram_bytes: what may be held on each device.
        tell: takes each event.
    """

    registry: Registry
    executor: Executor
    devices: Sequence[Device]
    memory_bytes: int | None
    vram_bytes: int | None
    tell: Callable[[Event], None]


def verification_of(directory: Path, location: str, means: Means, *, recomputes: bool) -> Verification:
    """What was checked of an output, a merge's or a sweep's, and what was found.

    Args:
        directory: where it lies.
        location: what it is called.
        means: what may be used.
        recomputes: whether the recipe is run again.

    Raises:
        CheckpointError: it is not the output of a merge.
    """
    if (directory / INDEX_NAME).is_file():
        return _of_sweep(directory, location, means, recomputes=recomputes)
    return _of_output(directory, location, means, recomputes=recomputes)


def _of_output(directory: Path, location: str, means: Means, *, recomputes: bool) -> Verification:
    """That of the output of one merge."""
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "there is no such directory"
        raise CheckpointError(f"{location}: {what}; expected what a merge has made.")
    refuse_devices(directory)
    return _Verifying(directory, location, Manifest.read(directory), means).run(recomputes=recomputes)


def _of_sweep(directory: Path, location: str, means: Means, *, recomputes: bool) -> Verification:
    """That of all variants that the index names, as one."""
    index = read_index(directory)
    found: dict[str, Verification] = {}
    faults: list[Fault] = []
    for variant in index:
        own = directory / variant.name
        try:
            found[variant.name] = _of_output(own, f"{location}/{variant.name}", means, recomputes=recomputes)
            faults += faults_of_variant(variant, own)
        except CheckpointError as error:
            message = f"cannot be verified: {without_advice(error)}"
            faults.append(Fault(kind="structure", where=variant.name, message=message))
    return Verification(
        location=location,
        variants=tuple(variant.name for variant in index),
        output_files=sum(own.output_files for own in found.values()),
        source_files=sum(own.source_files for own in found.values()),
        modules=sum(own.modules for own in found.values()),
        is_recomputed=bool(found) and all(own.is_recomputed for own in found.values()),
        recomputed=tuple(
            check.model_copy(update={"module": f"{name}/{check.module}"})
            for name, own in found.items()
            for check in own.recomputed
        ),
        faults=(*faults, *(_of_variant(name, fault) for name, own in found.items() for fault in own.faults)),
        information=(
            *beside_variants(directory, index),
            *(f"{name}: {text}" for name, own in found.items() for text in own.information),
        ),
    )


def _of_variant(name: str, fault: Fault) -> Fault:
    """A fault of a variant, named with it once."""
    return fault if fault.where == name else fault.model_copy(update={"where": f"{name}/{fault.where}"})


class _Verifying:
    """One output under verification.

    Args:
        directory: of it.
        location: what it is called.
        manifest: of it.
        means: what may be used.
    """

    def __init__(self, directory: Path, location: str, manifest: Manifest, means: Means) -> None:
        self._directory, self._manifest, self._means = directory, manifest, means
        self._location, self._label = location, Path(location).name or location
        self._faults: list[Fault] = []
        self._information = [*_versions(manifest)]

    def run(self, *, recomputes: bool) -> Verification:
        """What was found. A fault ends only the steps that cannot do without what is broken."""
        outputs = self._noted(check_outputs(self._directory, self._manifest))
        said, contents = self._read()
        recipe = self._recipe()
        sources = None
        if recipe is not None:
            sources = self._noted(check_sources(self._manifest, recipe, self._means.registry, must_exist=recomputes))
        can_recompute = recomputes and sources is not None and sources.are_all_there and not self._lacks_inputs
        compared = self._compared(recipe, contents, said) if recipe and said and can_recompute else None
        return Verification(
            location=self._location,
            output_files=outputs.count,
            source_files=0 if sources is None else sources.count,
            modules=contents.modules,
            is_recomputed=compared is not None,
            recomputed=tuple(own.check for own in compared or () if own.check is not None),
            faults=tuple(self._faults),
            information=tuple(self._information),
        )

    @property
    def _lacks_inputs(self) -> bool:
        """Whether an input was in memory, so that nothing is left of it."""
        return any(not source.files for source in self._manifest.sources)

    def _noted(self, hashed: Hashed) -> Hashed:
        self._faults += hashed.faults
        self._information += hashed.information
        return hashed

    def _read(self) -> tuple[Said | None, Contents]:
        if any(fault.where == REPORT_NAME for fault in self._faults) and not (self._directory / REPORT_NAME).exists():
            return None, Contents()  # which is a fault already
        try:
            said = Said.read(self._directory)
        except CheckpointError as error:
            self._faults.append(Fault(kind="structure", where=REPORT_NAME, message=str(error)))
            return None, Contents()
        contents = read_contents(self._directory, said, self._means.registry, self._label)
        self._faults += contents.faults
        self._information += [*contents.information, *_sum_error(said)]
        return said, contents

    def _recipe(self) -> Recipe | None:
        path = self._directory / RECIPE_NAME
        try:
            return load_recipe(path)
        except (MergeError, OSError) as error:
            self._faults.append(Fault(kind="recipe", where=RECIPE_NAME, message=f"cannot be read: {error}"))
            return None

    def _compared(self, recipe: Recipe, contents: Contents, said: Said) -> list[Compared] | None:
        """Each module beside its recomputation; None where there is nothing to compare, or no merge."""
        if contents.adapter is None and contents.model is None:
            return None
        means = self._means
        try:
            plan = self._plan(recipe, contents)
            found = recompute(
                plan,
                contents,
                said,
                self._directory,
                executor=means.executor,
                devices=means.devices,
                vram_bytes=means.vram_bytes,
                tell=means.tell,
            )
        except (DiskError, InterruptedMergeError, MemoryBudgetError):  # which say nothing of the output
            raise
        except MergeError as error:
            self._faults.append(Fault(kind="recipe", where=RECIPE_NAME, message=f"cannot be merged again: {error}"))
            return None
        self._note(plan, found, said)
        return found

    def _plan(self, recipe: Recipe, contents: Contents) -> Plan:
        """That of the recipe.

        Raises:
            MergeError: there is none, or of something else than the output.
        """
        registry, workers = self._means.registry, self._means.executor.workers
        if recipe.base_model is not None:
            require_local(recipe.base_model, recipe.directory)
            refuse_devices(recipe.directory / recipe.base_model)
        plans = [*plans_of(recipe, registry, workers, self._means.memory_bytes, strict=False).values()]
        if len(plans) > 1:
            raise recipe.problem(("sweep",), f"makes {len(plans)} outputs, and this is one")
        made, found = ("a model" if is_model else "an adapter" for is_model in (plans[0].folds, bool(contents.model)))
        if made != found:
            raise recipe.problem(("output", "kind"), f"makes {made}, and the output is {found}")
        return plans[0]

    def _note(self, plan: Plan, found: Sequence[Compared], said: Said) -> None:
        """What the recomputation found."""
        self._faults += [fault for own in found for fault in own.faults]
        self._information += [text for own in found for text in own.information]
        self._information += _other_directions(found)
        self._information += _other_labels(plan, self._manifest)
        reported, planned = {module.module for module in said.modules}, {module.name for module in plan.modules}
        for names, what in (
            (reported - planned, "is in the report, and the recipe does not merge it"),
            (planned - reported, "is merged by the recipe, and the report does not name it"),
        ):
            message = f"{what}: the recipe or an input changed. Merge again."
            self._faults += [Fault(kind="recipe", where=name, message=message) for name in sorted(names)]


def _other_directions(found: Sequence[Compared]) -> Iterator[str]:
    """Modules that rounding decides, as their warnings say."""
    modules = [own.check.module for own in found if own.keeps_other_directions and own.check is not None]
    if modules:
        more = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
        yield (
            f"'{modules[0]}'{more}: cut between equal singular values, which leaves directions open; merged again, "
            "other ones of the same norm are kept"
        )


def _other_labels(plan: Plan, manifest: Manifest) -> Iterator[str]:
    """Inputs that go by another name here, which random numbers are keyed by."""
    for own, source in zip(plan.inputs, manifest.sources, strict=True):
        if own.label != source.label:
            yield (
                f"input '{source.label}' is called '{own.label}' here, and methods key random numbers by these names: "
                "give the directories of the inputs names of their own"
            )


def _versions(manifest: Manifest) -> Iterator[str]:
    """What decides bytes, and is not what the merge was made with."""
    made = {"mergekit-lowrank": manifest.mergekit_lowrank, **manifest.packages}
    here = {"mergekit-lowrank": __version__, **{name: version(name) for name in PACKAGES}}
    changed = [f"{name} {made[name]} (here {here[name]})" for name in here if made.get(name, here[name]) != here[name]]
    if manifest.machine != platform.machine():
        changed.append(f"{manifest.machine} (here {platform.machine()})")
    if changed:
        yield f"it was merged with {', '.join(changed)}, so bits may differ"


def _sum_error(said: Said) -> Iterator[str]:
    """How far the method is from a weighted sum, which is no fault of it."""
    errors = {module.module: module.relative_error for module in said.modules if module.relative_error}
    if errors:
        worst = max(errors, key=lambda name: errors[name] or 0.0)
        yield (
            f"as method and rank have it, updates differ from the exact weighted sum by up to {errors[worst]:.2g} of "
            f"its norm ('{worst}')"
        )
