"""``diagnose``: one streamed pass over the inputs of a recipe, which says how they stand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import gettempdir

from mergekit_lowrank.diagnostics.diagnosis import Diagnosis, ModuleDiagnosis
from mergekit_lowrank.diagnostics.findings import findings_of
from mergekit_lowrank.diagnostics.measures import ModuleMeasure, with_room
from mergekit_lowrank.diagnostics.overall import (
    input_diagnoses,
    mean,
    pair_diagnosis,
    unmeasured_of,
    weighted_energy,
)
from mergekit_lowrank.engine import ModulePlan, Plan, select_devices
from mergekit_lowrank.engine.memory import settle_allocator
from mergekit_lowrank.engine.placement import DevicePool
from mergekit_lowrank.engine.surveying import Rounds, run_surveys
from mergekit_lowrank.errors import MergeError
from mergekit_lowrank.events import Reporter
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.formats import Derived
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.requests import RecipeLike, as_recipe, executor_of, plans_of
from mergekit_lowrank.runs import Followers

__all__ = ["diagnose"]


def diagnose(
    recipe: RecipeLike,
    *,
    registry: Registry | None = None,
    memory_bytes: int | None = None,
    device: str | None = None,
    executor: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    reporters: Sequence[Reporter] = (),
) -> Diagnosis:
    """How the inputs of a recipe stand to each other, and to what the recipe makes of them; nothing is written.

    Every module is read, measured and merged once, and forgotten; what is left out here the recipe's ``execution``
    says. The same bytes come out for any executor, number of workers and amount of memory.

    Args:
        recipe: a path, a mapping, or a ``Recipe``; without a sweep.
        registry: what there is to merge with; by default the built-ins and every installed plugin.
        memory_bytes: what it may hold beside the interpreter and torch.
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs), ``cuda:N`` or ``mps``; by default ``auto``.
        executor: how modules are scheduled: ``threads`` (default), ``processes``, ``serial``, or a plugin's.
        workers: modules that are measured at once; by default one for each processor.
        strict: whether a warning of the plan is an error.
        reporters: followers of the rounds, beside those of plugins.

    Raises:
        MergeError: what the recipe, the inputs or a plugin did wrong, as in a merge; or a module does not fit.
    """
    registry, whole = registry or Registry.load(), as_recipe(recipe)
    scheduler = executor_of(registry, whole, executor, workers)
    plans = plans_of(whole, registry, scheduler.workers, memory_bytes, strict=strict)
    if len(plans) > 1:
        raise MergeError(
            f"this recipe is a sweep of {len(plans)} variants, and a diagnosis is of one merge; take the key "
            "sweep out, or leave one value in it"
        )
    (plan,) = plans.values()
    pool = DevicePool(select_devices(device or whole.execution.device or "auto"), whole.execution.vram_bytes)
    followers = Followers([*reporters, *(cls() for cls in registry.reporters.values())])
    with closing(followers), closing(scheduler):
        modules = _measured(plan, scheduler, pool, followers)
    return _diagnosis(plan, modules, followers.warnings)


def _measured(plan: Plan, scheduler: Executor, pool: DevicePool, followers: Followers) -> list[ModuleDiagnosis]:
    """One for each module that holds updates, in the plan's order."""
    roomy = with_room(plan)
    settle_allocator([roomy], scheduler.workers)
    rounds = Rounds([roomy], scheduler, pool, Path(gettempdir()), followers.tell, stage="diagnosis")
    (surveys,) = run_surveys([roomy], rounds)
    names = [module.name for module in plan.modules if not _holds_values(plan, module)]
    found = dict(rounds.run(names, ModuleMeasure(roomy, surveys)))
    return [found[name] for name in names]


def _holds_values(plan: Plan, module: ModulePlan) -> bool:
    """Whether its inputs are parameters, not differences to the base: what ``extras`` averages or takes from one."""
    if plan.folds or plan.recipe.extras == "delta":
        return False
    inputs = [plan.inputs[t] for t in module.participants]
    return all(isinstance(own, Derived) and module.name not in own.origin.modules for own in inputs)


def _diagnosis(plan: Plan, modules: Sequence[ModuleDiagnosis], warnings: Sequence[str]) -> Diagnosis:
    energies = [weighted_energy(module) for module in modules]
    found = Diagnosis(
        method=plan.recipe.merge_method,
        spaces=tuple(dict.fromkeys(module.group.space.name for module in plan.modules)),
        base_model=plan.base_model,
        inputs=input_diagnoses(plan.inputs, modules),
        pairs=pair_diagnosis([checkpoint.label for checkpoint in plan.inputs], modules),
        sign_conflict=mean(zip((module.sign_conflict for module in modules), energies, strict=True)),
        core_overlap=_core_overlap(modules, energies),
        modules=tuple(modules),
        findings=(),
        sampled=any(module.signs_are_sampled for module in modules),
        unmeasured=unmeasured_of(modules, [own.name for own in plan.modules if _holds_values(plan, own)]),
        warnings=(*plan.warnings, *warnings),
    )
    return found.model_copy(update={"findings": findings_of(found)})


def _core_overlap(modules: Sequence[ModuleDiagnosis], energies: Sequence[float]) -> tuple[float, float] | None:
    """The means of both sides over the modules that have them."""
    known = [(own.core_overlap, weight) for own, weight in zip(modules, energies, strict=True) if own.core_overlap]
    rows, columns = (mean((own[side], weight) for own, weight in known) for side in (0, 1))
    return None if rows is None or columns is None else (rows, columns)
