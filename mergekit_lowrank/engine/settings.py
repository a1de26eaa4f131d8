"""What the recipe says about one module: method, parameters, space, weights, scale and rank, all resolved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from mergekit_lowrank.errors import MergeError, RecipeError, StrategyError, nearest_name
from mergekit_lowrank.policies import AutoScale, FixedScale, RetentionScale, ScalePolicy
from mergekit_lowrank.recipe import Rank, Recipe, Retention, Rule, Scale, leaves, matches, resolve, unused_filters
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.spaces import Space
from mergekit_lowrank.strategies import Preset, Strategy

__all__ = ["Group", "Settings", "SettingsResolver", "filter_warnings"]

Loc = tuple[str | int, ...]

INSTEAD = {
    "normalize": "For mergekit's normalize, `ties` takes disjoint: mean (true) or disjoint: sum (false).",
    "rescale": "The methods that drop entries have it (mergekit's is `norm`); `scale` sets how large the result is.",
    "nuslerp_flatten": "For mergekit's nuslerp_flatten write granularity: tensor (true) or row (false).",
    "nuslerp_row_wise": "For mergekit's nuslerp_row_wise: true write granularity: column (its name is inverted).",
    "filter_wise": "For mergekit's filter_wise: true write granularity: row.",
    "eps": "Leave mergekit's eps out: nothing is added to a denominator here.",
}
"""Parameters of mergekit's methods that are called otherwise here."""


ELEMENTWISE_SPACE = "delta"
"""Where what is not a matrix is merged: a vector has no singular directions, and a row of an embedding is a token's."""


AVERAGING = "task_arithmetic"
"""What adds tensors that replace the base's; their weights sum to 1."""


SHOWN = 3
"""Filters named in one warning; the rest is counted."""


@dataclass(frozen=True, eq=False)
class Group:
    """Modules that share a method, its parameters and its space: one strategy, one survey.

    Attributes:
        key: text that two groups share exactly when they are one.
        method: the name in the recipe.
        owner: the plugin that registered it.
        strategy: the instance that merges them.
        space: the instance that encodes them.
        takes_dense: whether both take dense inputs.
        input_params: parameters of its own, for each input of the recipe.
    """

    key: str
    method: str
    owner: str
    strategy: Strategy
    space: Space
    takes_dense: bool
    input_params: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Settings:
    """What the recipe says about one module."""

    group: Group
    weights: tuple[float, ...]
    scale: ScalePolicy
    rank: Rank
    has_own_rank: bool
    is_rank_given: bool


@dataclass(frozen=True)
class _Scope:
    """One place that settles a method: the recipe itself, or a rule."""

    preset: Preset
    space: type[Space]
    sources: tuple[tuple[Mapping[str, Any], Loc], ...]
    inherits_models: bool
    rule: Rule | None = None
    names: frozenset[str] = field(default_factory=frozenset)


class SettingsResolver:
    """Resolves the recipe's settings module by module; checks names and values once, when made.

    Raises:
        RecipeError, StrategyError: every unknown name and every value out of range, together.
    """

    def __init__(self, recipe: Recipe, registry: Registry) -> None:
        self._recipe, self._registry = recipe, registry
        self.problems: list[MergeError] = []
        self._groups: dict[str, Group] = {}
        self._general = self._scope(None, ())
        self._rules = [(rule, self._scope(rule, ("rules", i))) for i, rule in enumerate(recipe.rules)]
        self.unmatched = dict.fromkeys(range(len(recipe.rules)))
        for scope in filter(None, (self._general, *(scope for _, scope in self._rules))):
            self.problems += self._check_parameters(scope)

    def _scope(self, rule: Rule | None, at: Loc) -> _Scope | None:
        recipe, own_method = self._recipe, rule.merge_method if rule else None
        try:
            preset = self._registry.method(own_method or recipe.merge_method)
        except RecipeError as error:
            if not rule or own_method:
                self.problems.append(recipe.problem((*at, "merge_method"), str(error)))
            return None
        inherited = rule is None or own_method is None
        space = rule.space if rule and rule.space else recipe.space if inherited else None
        try:
            space_class = self._space(preset, space)
        except RecipeError as error:
            if not rule or rule.space or own_method:
                self.problems.append(recipe.problem((*at, "space"), str(error)))
            return None
        sources = [(rule.parameters, (*at, "parameters"))] if rule else []
        if inherited:
            sources.append((recipe.parameters, ("parameters",)))
        own, theirs = frozenset(preset.strategy.Params.model_fields), frozenset(space_class.Params.model_fields)
        if own & theirs:
            clash = f"'{preset.name}' and space '{space_class.name}' both have a parameter {', '.join(own & theirs)}"
            self.problems.append(StrategyError(f"{clash}; a recipe could not tell them apart, so one must be renamed"))
        self.problems += self._wrong_input_count(preset, at)
        return _Scope(preset, space_class, tuple(sources), inherited, rule, own | theirs)

    def _wrong_input_count(self, preset: Preset, at: Loc) -> Iterator[MergeError]:
        lowest, highest = preset.strategy.min_inputs, preset.strategy.max_inputs
        count = len(self._recipe.models)
        if count < lowest or (highest is not None and count > highest):
            bound = f"at least {lowest}" if count < lowest else f"at most {highest}"
            takes = f"exactly {lowest}" if lowest == highest else bound
            message = f"'{preset.name}' merges {takes} models, and the recipe gives {count}"
            yield self._recipe.problem((*at, "merge_method"), message)

    def _space(self, preset: Preset, asked: str | None) -> type[Space]:
        allowed = self._registry.spaces_of(preset)
        space = self._registry.space(asked or allowed[0])
        if space.name not in allowed:
            raise RecipeError(
                f"'{preset.name}' does not work in space '{space.name}'; it works in {', '.join(allowed)}"
            )
        return space

    def _check_parameters(self, scope: _Scope) -> Iterator[MergeError]:
        own = scope.sources[0]
        for name, value in own[0].items():
            yield from self._check_parameter(scope, name, value, own[1], scope.names | {"weight"})
        if scope.rule is None:
            per_input = scope.preset.strategy.Params.per_input_names() | {"weight"}
            for index, entry in enumerate(self._recipe.models):
                for name, value in entry.parameters.items():
                    at: Loc = ("models", index, "parameters")
                    if name in scope.names and name not in per_input:
                        yield self._recipe.problem(
                            (*at, name),
                            f"'{name}' belongs to the whole merge; move it to the top-level 'parameters'",
                            key=True,
                        )
                    else:
                        yield from self._check_parameter(scope, name, value, at, per_input)

    def _check_parameter(
        self, scope: _Scope, name: str, value: Any, at: Loc, known: frozenset[str]
    ) -> Iterator[MergeError]:
        if name not in known:
            nearest = nearest_name(name, known)
            hint = f"; did you mean '{nearest}'?" if nearest else "."
            listing = ", ".join(sorted(known))
            instead = f" {INSTEAD[name]}" if name in INSTEAD else ""
            message = f"'{scope.preset.name}' has no parameter '{name}'{hint}{instead} It has: {listing}."
            yield self._recipe.problem((*at, name), message, key=True)
            return
        if name == "weight":
            return
        for where, leaf in leaves(value):
            problem = self._invalid(scope, name, leaf)
            if problem and isinstance(leaf, float) and leaf.is_integer() and not self._invalid(scope, name, int(leaf)):
                problem = "a whole number cannot be interpolated over depth; give one number, or [{filter, value}, …]"
            if problem:
                yield self._recipe.problem((*at, name, *where), problem)

    def _invalid(self, scope: _Scope, name: str, leaf: Any) -> str | None:
        fields = {**scope.space.Params.model_fields, **scope.preset.strategy.Params.model_fields}
        info = fields[name]
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[info.annotation, info])  # type: ignore[arg-type]
        try:
            adapter.validate_python(leaf, strict=True)
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Input should be ")
            return f"expected {what}, found {leaf!r} ({info.description or 'see the parameter table'})"
        return None

    def of(self, module: str, depth: float, *, is_matrix: bool = True, replaces: bool = False) -> Settings:
        """The settings of one module; ``problems`` must be empty.

        Args:
            module: its name.
            depth: where it lies in the model, from 0 to 1.
            is_matrix: whether it is a weight matrix; norms, biases and embeddings are merged in ``delta``.
            replaces: whether its values replace those of the base: they are added by weight, whatever the method.

        Raises:
            StrategyError: the method has no way to merge what is not a matrix.
        """
        scope = self._matching(module)
        if replaces:
            scope = self._in_place_of(scope, AVERAGING, {})
        elif not is_matrix:
            scope = self._beside_matrices(scope)
        chosen = self._chosen(scope, module, depth)
        rule, recipe = scope.rule, self._recipe
        inherits_scale = rule is None or rule.scale is None
        own_rank = rule is not None and rule.rank is not None
        return Settings(
            group=self._group(scope, chosen, self._own(scope, module, depth)),
            weights=tuple(float(w) for w in self._weights(scope, module, depth)),
            scale=FixedScale(1.0) if replaces else scale_policy(recipe.scale if inherits_scale else rule.scale),  # type: ignore[arg-type, union-attr]
            rank=(rule.rank if own_rank else recipe.output.rank) or scope.preset.default_rank,  # type: ignore[union-attr]
            has_own_rank=own_rank,
            is_rank_given=own_rank or recipe.output.rank is not None,
        )

    def _matching(self, module: str) -> _Scope:
        for index, (rule, scope) in enumerate(self._rules):
            if matches(rule.match, module):
                self.unmatched.pop(index, None)
                assert scope is not None  # noqa: S101 - problems are raised before
                return scope
        assert self._general is not None  # noqa: S101 - problems are raised before
        return self._general

    def _beside_matrices(self, scope: _Scope) -> _Scope:
        """What merges norms, biases and embeddings in place of a method: itself in ``delta``, or its stand-in there."""
        delta = self._registry.space(ELEMENTWISE_SPACE)
        strategy = scope.preset.strategy
        if strategy.supports(delta.name):
            return replace(scope, space=delta, names=_names(scope.preset, delta))
        if strategy.stand_in is None:
            raise StrategyError(
                f"'{scope.preset.name}' merges weight matrices only, and this is a norm, a bias or an embedding. "
                "Give these a rule with a method that works in delta, such as {match: 'regex:norm|bias|embed', "
                "merge_method: linear}"
            )
        return self._in_place_of(scope, *strategy.stand_in)

    def _in_place_of(self, scope: _Scope, name: str, parameters: Mapping[str, Any]) -> _Scope:
        """Another method in ``delta``, with the weights of this one."""
        preset, delta = self._registry.method(name), self._registry.space(ELEMENTWISE_SPACE)
        weights = tuple(({k: v for k, v in source.items() if k == "weight"}, loc) for source, loc in scope.sources)
        sources = ((parameters, ()), *weights)
        return replace(
            scope, preset=preset, space=delta, sources=sources, inherits_models=False, names=_names(preset, delta)
        )

    def _chosen(self, scope: _Scope, module: str, depth: float) -> dict[str, Any]:
        fixed = {**scope.preset.strategy.space_defaults, **scope.preset.parameters}
        chosen = {name: value for name, value in fixed.items() if name in scope.names}
        for source, _ in reversed(scope.sources):
            for name, value in source.items():
                found = resolve(value, module, depth=depth)
                if name != "weight" and found is not None:
                    chosen[name] = found
        return chosen

    def _own(self, scope: _Scope, module: str, depth: float) -> list[dict[str, Any]]:
        if not scope.inherits_models:
            return [{} for _ in self._recipe.models]
        resolved = [
            {name: resolve(value, module, depth=depth) for name, value in entry.parameters.items() if name != "weight"}
            for entry in self._recipe.models
        ]
        return [{name: value for name, value in own.items() if value is not None} for own in resolved]

    def _weights(self, scope: _Scope, module: str, depth: float) -> Iterator[Any]:
        shared = [source["weight"] for source, _ in scope.sources if "weight" in source]
        for entry in self._recipe.models:
            own = [entry.parameters["weight"]] if "weight" in entry.parameters else []
            found = (resolve(value, module, depth=depth) for value in (*own, *shared))
            yield next((value for value in found if value is not None), 1.0)

    def _group(self, scope: _Scope, chosen: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> Group:
        key = json.dumps([scope.preset.name, scope.space.name, chosen, own], sort_keys=True)
        if key not in self._groups:
            strategy = scope.preset.strategy
            self._groups[key] = Group(
                key=key,
                method=scope.preset.name,
                owner=self._registry.owner("strategies", scope.preset.name),
                strategy=strategy(self._params(scope, strategy.Params, chosen)),
                space=scope.space(self._params(scope, scope.space.Params, chosen)),
                takes_dense=scope.preset.takes_dense and scope.space.takes_dense,
                input_params=tuple(own),
            )
        return self._groups[key]

    def _params(self, scope: _Scope, model: type[Any], chosen: Mapping[str, Any]) -> Any:
        try:
            params: BaseModel = model(**{name: value for name, value in chosen.items() if name in model.model_fields})
        except ValidationError as error:
            lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise self._recipe.problem(scope.sources[0][1], f"'{scope.preset.name}': {lines}") from error
        return params


def filter_warnings(recipe: Recipe, modules: Sequence[str]) -> Iterator[str]:
    """A warning for each parameter with filters that take no module: they may be misspelt."""
    parts = {
        "": recipe.parameters,
        **{f"models[{i}].": entry.parameters for i, entry in enumerate(recipe.models)},
        **{f"rules[{i}].": rule.parameters for i, rule in enumerate(recipe.rules)},
    }
    for part, parameters in parts.items():
        for name, value in parameters.items():
            unused = unused_filters(value, modules)
            if unused:
                more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
                named = ", ".join(f"'{own}'" for own in unused[:SHOWN])
                yield (
                    f"{part}parameters.{name}: the filters {named}{more} take no module of the inputs: none matches, "
                    "or filters before them take it"
                )


def _names(preset: Preset, space: type[Space]) -> frozenset[str]:
    return frozenset(preset.strategy.Params.model_fields) | frozenset(space.Params.model_fields)


def scale_policy(scale: Scale) -> ScalePolicy:
    """The policy behind the recipe's ``scale``."""
    if scale == "auto":
        return AutoScale()
    return RetentionScale(scale.retention) if isinstance(scale, Retention) else FixedScale(float(scale))
