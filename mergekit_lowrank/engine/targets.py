"""The adapter as it will be written, before it is: its configuration, its dialect, what its server would do with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mergekit_lowrank.engine.plan import ModulePlan, Plan
from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.filenames import MODEL_CONFIG, SIDE_FILE
from mergekit_lowrank.formats import Checkpoint, Extra, ModuleHeader, TokenRow, Whole, output_config
from mergekit_lowrank.formats.layouts import LORA_BIAS, PREFIX
from mergekit_lowrank.lowrank import InputUpdate
from mergekit_lowrank.recipe import Recipe
from mergekit_lowrank.servers import SERVERS, Verdict

__all__ = [
    "PlannedAdapter",
    "adapter_config",
    "dialect_of",
    "loading_server",
    "located_base",
    "model_config",
    "model_config_remarks",
    "target_problems",
    "target_remarks",
]


def dialect_of(recipe: Recipe) -> str:
    """The name of the writer of the output: as given, else what the target loads."""
    output = recipe.output
    if output.target is not None and "format" not in output.model_fields_set:
        return SERVERS[output.target].format
    return output.format


def adapter_config(plan: Plan, ranks: Mapping[str, int]) -> dict[str, object]:
    """The ``adapter_config.json`` of a merged adapter.

    Args:
        plan: what is merged.
        ranks: of the modules with factors, as written.
    """
    return output_config(
        base_model=plan.base_model,
        revision=_agreed(own.revision for own in plan.inputs),
        task_type=_agreed(own.task_type for own in plan.inputs),
        layouts={module.name: module.layout for module in plan.modules},
        ranks=ranks,
        fan_in_fan_out=any(own.fan_in_fan_out for own in plan.inputs),
    )


def model_config(inputs: Iterable[Checkpoint]) -> Path | None:
    """The model's ``config.json``, which LLaVA's loader reads beside its side file; the first input's that has one."""
    return next(_model_configs(inputs), None)


def model_config_remarks(inputs: Iterable[Checkpoint]) -> Iterator[str]:
    """A warning where those of the inputs differ."""
    configs = [*_model_configs(inputs)]
    first = next(iter(configs), None)
    if first is not None and any(first.read_bytes() != path.read_bytes() for path in configs):
        yield f"the inputs differ in {MODEL_CONFIG}, which goes beside {SIDE_FILE}; the output gets '{first}'"


def _model_configs(inputs: Iterable[Checkpoint]) -> Iterator[Path]:
    for own in inputs:
        if any(path.name == SIDE_FILE for path in own.files):
            yield from (path for path in own.files if path.name == MODEL_CONFIG)


def target_problems(plan: Plan) -> Iterator[OutputError]:
    """What the recipe's target would refuse, drop or misapply of the adapter that is planned."""
    target = plan.recipe.output.target
    for own in _verdicts(plan):
        if own.is_fatal:
            yield OutputError(f"{plan.recipe.where(('output', 'target'))}: for {target}: {own}")


def target_remarks(plan: Plan) -> list[str]:
    """What else there is to know of it."""
    return [f"for {plan.recipe.output.target}: {own}" for own in _verdicts(plan) if not own.is_fatal]


def _verdicts(plan: Plan) -> list[Verdict]:
    target = plan.recipe.output.target
    return [] if target is None else SERVERS[target].judge(PlannedAdapter(plan), dialect=dialect_of(plan.recipe))


def loading_server(plan: Plan, ranks: Mapping[str, int]) -> str | None:
    """The server that an adapter is for, as it was written: its target, else the first that loads its dialect.

    None where that one would refuse, drop or misapply something in it.
    """
    dialect = dialect_of(plan.recipe)
    first = next((name for name, server in SERVERS.items() if server.format == dialect), None)
    name = plan.recipe.output.target or first
    if name is None or plan.folds:
        return None
    found = SERVERS[name].judge(PlannedAdapter(plan, ranks), dialect=dialect)
    return None if any(own.is_fatal for own in found) else name


class PlannedAdapter(Checkpoint):
    """The headers of the adapter that a plan will make.

    Args:
        plan: what is merged.
        ranks: of the modules with factors, as far as they are written; one that is not known counts as the least.
    """

    def __init__(self, plan: Plan, ranks: Mapping[str, int] | None = None) -> None:
        self.label = self.location = "the merged adapter"
        self.files = ()
        self.base_model = located_base(plan)
        planned = {module.name: plan.written_rank(module) or 1 for module in plan.modules if module.is_factored}
        ranks = {**planned, **(ranks or {})}
        self.config = adapter_config(plan, ranks)
        self.modules = {own.name: _header(own, ranks) for own in plan.modules if own.name in ranks or _is_bias(own)}
        beside = [_extra(own) for own in plan.modules if own.name not in self.modules]
        self.extras = {extra.name: extra for extra in beside}

    def read(self, module: str) -> InputUpdate:
        """Nothing: it is not made yet."""
        raise KeyError(module)


def located_base(plan: Plan) -> str | None:
    """What the adapter calls its base; the path of a directory here, from wherever it is looked for."""
    named = plan.base_model
    directory = plan.recipe.directory / (named or "")
    return str(directory.resolve()) if named and directory.is_dir() else named


def _is_bias(module: ModulePlan) -> bool:
    return isinstance(module.layout, Whole) and module.layout.key.endswith(LORA_BIAS)


def _header(module: ModulePlan, ranks: Mapping[str, int]) -> ModuleHeader:
    is_factored = module.name in ranks
    return ModuleHeader(
        name=module.name,
        d_out=module.shape.d_out,
        d_in=module.shape.d_in,
        rank=ranks.get(module.name, 1),
        scaling=1.0,
        dtype=module.dtype,
        stored_bytes=0,
        is_dense=not is_factored,
        kind="matrix" if is_factored else "vector",
        layout=module.layout,
    )


def _extra(module: ModulePlan) -> Extra:
    layout = module.layout
    if isinstance(layout, TokenRow):
        return Extra(module.name, layout.key, module.dtype, (1, module.shape.d_in), tokens=(layout.token,))
    assert isinstance(layout, Whole)  # noqa: S101 - what has no factors and is no row
    saved, beside = layout.saved_under, layout.in_side_file
    name = layout.key.removeprefix(PREFIX)
    return Extra(name, layout.key, module.dtype, layout.shape, saved_under=saved, in_side_file=beside)


def _agreed(values: Iterable[str | None]) -> str | None:
    """The value that all inputs which give one agree on, else None."""
    given = {value for value in values if value}
    return given.pop() if len(given) == 1 else None
