"""Plugins register through hooks, and whatever is wrong with one is said by name."""

from types import SimpleNamespace

import pytest
import torch

from mergekit_lowrank import (
    ElementwiseStrategy,
    MergeError,
    PluginError,
    Preset,
    RecipeError,
    Registry,
    StrategyError,
    hookimpl,
)
from mergekit_lowrank import registry as registry_module
from mergekit_lowrank.strategies import Params, RobustMerge


class Median(ElementwiseStrategy):
    """Coordinate-wise median."""

    name = "median"
    summary = "the coordinate-wise median"

    def merge_block(self, block, weights, context):
        return block.median(dim=0).values


class MedianPlugin:
    @hookimpl
    def strategies(self):
        return [Median]


class FakeEntry(SimpleNamespace):
    dist = SimpleNamespace(name="some-distribution", version="1.2")

    def load(self):
        return self.loads()


def install(monkeypatch, **plugins):
    entries = [FakeEntry(name=name, value=f"{name}_module", loads=loads) for name, loads in plugins.items()]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: entries)


def test_built_ins_come_through_the_same_hooks() -> None:
    registry = Registry()
    assert set(registry.methods) >= {"linear", "task_arithmetic", "ties", "knots", "core_ties", "robustmerge", "drm"}
    assert set(registry.spaces) == {"factors", "delta", "joint", "core"}
    assert registry.owner("strategies", "ties") == "mergekit-lowrank"


def test_a_registered_strategy_is_found_by_name() -> None:
    registry = Registry()
    registry.register(MedianPlugin(), "median-plugin")
    assert registry.method("median").strategy is Median
    assert registry.owner("strategies", "median") == "median-plugin"


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown merge_method 'robustmrege'; did you mean 'robustmerge'"):
        Registry().method("robustmrege")


def test_a_duplicate_name_names_both_owners() -> None:
    registry = Registry()
    registry.register(MedianPlugin(), "first")
    with pytest.raises(PluginError, match="'median' is registered by both 'first' and 'second'"):
        registry.register(MedianPlugin(), "second")
    assert registry.method("median").strategy is Median


def test_a_refused_plugin_leaves_nothing_behind() -> None:
    class Half:
        @hookimpl
        def strategies(self):
            return [Median, RobustMerge]

    registry = Registry()
    with pytest.raises(PluginError, match="robustmerge"):
        registry.register(Half(), "half")
    with pytest.raises(RecipeError):
        registry.method("median")
    registry.register(MedianPlugin(), "later")


def test_a_misspelt_hook_is_named_with_the_right_one() -> None:
    class Misspelt:
        @hookimpl
        def stratgies(self):
            return []

    with pytest.raises(PluginError, match="there is no hook 'stratgies'; did you mean 'strategies'"):
        Registry().register(Misspelt(), "misspelt")


def test_something_that_is_no_strategy_is_refused() -> None:
    class Wrong:
        @hookimpl
        def strategies(self):
            return [int]

    with pytest.raises(PluginError, match="plugin 'wrong': hook 'strategies' returned <class 'int'>"):
        Registry().register(Wrong(), "wrong")


def test_a_strategy_without_a_name_is_refused() -> None:
    class Nameless(ElementwiseStrategy):
        summary = "no name"

    class Wrong:
        @hookimpl
        def strategies(self):
            return [Nameless]

    with pytest.raises(PluginError, match="lacks name"):
        Registry().register(Wrong(), "wrong")


def test_a_parameter_called_weight_is_refused() -> None:
    class WeightParams(Params):
        weight: float = 1.0

    class Weighty(ElementwiseStrategy):
        name, summary, Params = "weighty", "clashes", WeightParams

        def merge_block(self, block, weights, context):
            return block.sum(dim=0)

    class Wrong:
        @hookimpl
        def strategies(self):
            return [Weighty]

    with pytest.raises(PluginError, match="a parameter called weight, a reserved name"):
        Registry().register(Wrong(), "wrong")


def test_a_hook_that_returns_no_list_is_refused_and_forgotten() -> None:
    class Wrong:
        @hookimpl
        def strategies(self):
            return Median

    registry = Registry()
    with pytest.raises(PluginError, match=r"hook 'strategies' returned .*Median.*; expected a list"):
        registry.register(Wrong(), "wrong")
    registry.register(MedianPlugin(), "wrong")


def test_a_plugin_whose_hooks_are_not_marked_is_refused() -> None:
    class Unmarked:
        def strategies(self):
            return [Median]

    with pytest.raises(PluginError, match=r"registers nothing: mark its hooks .* with hookimpl"):
        Registry().register(Unmarked(), "unmarked")


def test_an_elementwise_strategy_that_implements_nothing_is_refused() -> None:
    class Empty(ElementwiseStrategy):
        name, summary = "empty", "implements nothing"

    class Wrong:
        @hookimpl
        def strategies(self):
            return [Empty]

    with pytest.raises(PluginError, match="implements none of merge_block, merge_part and merge"):
        Registry().register(Wrong(), "wrong")


def test_a_preset_must_use_a_space_its_strategy_supports() -> None:
    with pytest.raises(StrategyError, match="'robustmerge' does not work in space 'core'"):
        Preset("wrong", RobustMerge, "in core", space="core")


def test_a_plugin_that_fails_to_import_does_not_take_the_rest_down(monkeypatch) -> None:
    def broken():
        raise ModuleNotFoundError("No module named 'nowhere'")

    install(monkeypatch, broken=broken, median=MedianPlugin)
    registry = Registry.load()
    assert registry.method("median").strategy is Median
    (failed,) = [record for record in registry.plugins if record.error]
    assert failed.name == "broken"
    assert failed.distribution == "some-distribution"
    assert "importing broken_module failed: ModuleNotFoundError: No module named 'nowhere'" in failed.error
    with pytest.raises(MergeError, match="plugins that failed to load: 'broken'"):
        registry.method("brokn")


@pytest.mark.parametrize("disabled", ["median", "all", "other, median"])
def test_plugins_can_be_disabled_by_environment(monkeypatch, disabled) -> None:
    install(monkeypatch, median=MedianPlugin)
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", disabled)
    assert "median" not in Registry.load().methods


def test_a_plugin_strategy_merges_through_the_public_api(tmp_path) -> None:
    from mergekit_lowrank import merge
    from mergekit_lowrank.testing import write_tiny_adapter

    registry = Registry()
    registry.register(MedianPlugin(), "median")
    paths = [write_tiny_adapter(tmp_path / str(i), {"layers.0.q": (6, 5)}, rank=2, seed=i) for i in range(3)]
    recipe = {"merge_method": "median", "models": [{"model": str(p)} for p in paths], "output": {"rank": 5}}
    merged = merge(recipe, registry=registry)
    deltas = []
    for path in paths:
        from safetensors.torch import load_file

        tensors = load_file(path / "adapter_model.safetensors")
        prefix = "base_model.model.layers.0.q.lora"
        deltas.append(2.0 * tensors[f"{prefix}_B.weight"] @ tensors[f"{prefix}_A.weight"])
    expected = torch.stack(deltas).median(dim=0).values
    prefix = "base_model.model.layers.0.q.lora"
    found = merged.state_dict[f"{prefix}_B.weight"] @ merged.state_dict[f"{prefix}_A.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
