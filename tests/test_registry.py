"""Plugins register through hooks, and whatever is wrong with one is said by name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

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
    __version__,
    hookimpl,
)
from mergekit_lowrank.formats import PeftWriter
from mergekit_lowrank.registry import PluginRecord
from mergekit_lowrank.strategies import Params, RobustMerge, Strategy
from tests.distributions import MEDIAN, Environment


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


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    return Environment(tmp_path, monkeypatch)


def offering(**hooks):
    """A plugin whose hooks return these."""
    return type(
        "Plugin", (), {name: staticmethod(hookimpl(lambda value=value: value)) for name, value in hooks.items()}
    )


def only_failure(registry: Registry) -> PluginRecord:
    (failed,) = [record for record in registry.plugins if record.error]
    return failed


def test_built_ins_come_through_the_same_hooks() -> None:
    registry = Registry()
    assert set(registry.methods) >= {"linear", "task_arithmetic", "ties", "knots", "core_ties", "robustmerge", "drm"}
    assert set(registry.spaces) >= {"factors", "delta", "joint", "core"}
    assert set(registry.writers) >= {"peft", "gguf"}
    assert registry.owner("strategies", "ties") == "mergekit-lowrank"


def test_a_registered_strategy_is_found_by_name() -> None:
    registry = Registry()
    registry.register(MedianPlugin(), "median-plugin")
    assert registry.method("median").strategy is Median
    assert registry.owner("strategies", "median") == "median-plugin"


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown merge_method 'robustmrege'; did you mean 'robustmerge'"):
        Registry().method("robustmrege")


def test_a_writer_is_found_by_its_name_and_an_unknown_one_is_refused() -> None:
    registry = Registry()
    writer = type("Kohya", (PeftWriter,), {"name": "kohya", "summary": "a dialect"})
    registry.register(offering(writers=[writer]), "dialects")
    assert registry.writer("kohya") is writer
    assert registry.owner("writers", "kohya") == "dialects"
    with pytest.raises(RecipeError, match="unknown format to write 'kohia'; did you mean 'kohya'"):
        registry.writer("kohia")
    with pytest.raises(PluginError, match="writers: the name 'peft' is registered by both 'mergekit-lowrank' and 'x'"):
        registry.register(offering(writers=[PeftWriter]), "x")


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


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            {"strategies": [Median(Params())]},
            r"hook 'strategies' returned <.*Median object.*>; expected subclasses of Strategy",
        ),
        ({"spaces": [Median]}, r"hook 'spaces' returned <class .*Median'>; expected subclasses of Space"),
        ({"writers": [Median]}, r"hook 'writers' returned <class .*Median'>; expected subclasses of Writer"),
        ({"strategies": [Preset("x", int, "no strategy")]}, "returned Preset.*; expected subclasses of Strategy"),
        ({"strategies": "median"}, r"hook 'strategies' returned 'median'; expected a list"),
        ({"strategies": None}, r"registers nothing"),
    ],
    ids=["an instance", "another kind", "no writer", "a preset of no strategy", "a string", "none"],
)
def test_a_hook_that_returns_the_wrong_type_is_refused(hooks, message) -> None:
    with pytest.raises(PluginError, match=message):
        Registry().register(offering(**hooks), "wrong")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"merge": Strategy.merge}, "lacks merge"),
        ({"spaces": "delta"}, r"lacks spaces \(a tuple of names\)"),
        ({"spaces": ()}, r"lacks spaces \(a tuple of names\)"),
        ({"name": 3}, "lacks name"),
        ({"Params": dict}, "Params of 'first' is <class 'dict'>; expected a subclass of Params"),
    ],
    ids=["abstract", "spaces in one string", "no spaces", "a number for a name", "a dict for parameters"],
)
def test_a_strategy_that_could_not_be_used_is_refused(attributes, message) -> None:
    def merge(self, coordinates, context):
        return coordinates.updates[0]

    complete = {"name": "first", "summary": "the first", "spaces": ("delta",), "merge": merge}
    Registry().register(offering(strategies=[type("First", (Strategy,), complete)]), "complete")
    with pytest.raises(PluginError, match=message):
        Registry().register(offering(strategies=[type("First", (Strategy,), complete | attributes)]), "wrong")


def test_a_plugin_that_fails_to_import_does_not_take_the_rest_down(environment) -> None:
    environment.install("broken", "import nowhere")
    environment.install("median-merge", MEDIAN)
    registry = Registry.load()
    assert registry.owner("strategies", "median") == "median-merge"
    assert only_failure(registry) == PluginRecord(
        name="broken",
        distribution="broken",
        version="1.2",
        error="importing broken failed: ModuleNotFoundError: No module named 'nowhere'",
    )
    with pytest.raises(MergeError, match="plugins that failed to load: 'broken'; see `mergekit-lowrank plugins`"):
        registry.method("brokn")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import sys; sys.exit(3)", "importing wrong failed: SystemExit: 3"),
        ("class Stop(BaseException): ...\nraise Stop('now')", "importing wrong failed: Stop: now"),
        ("def f(:", "importing wrong failed: SyntaxError"),
        (
            "import sys\nfrom mergekit_lowrank import hookimpl\n@hookimpl\ndef strategies(): sys.exit('no GPU')",
            "plugin 'wrong': SystemExit: no GPU",
        ),
        (
            "from mergekit_lowrank import hookimpl\n@hookimpl\ndef strategies(extra): return []",
            "plugin 'wrong': PluginValidationError",
        ),
        ("from mergekit_lowrank import hookimpl\n@hookimpl\ndef strategies(): return 1 / 0", "ZeroDivisionError"),
    ],
    ids=["exits", "its own base exception", "syntax", "a hook exits", "a hook takes arguments", "a hook raises"],
)
def test_whatever_a_plugin_raises_it_is_named_and_the_rest_stays_up(environment, source, cause) -> None:
    environment.install("wrong", source)
    environment.install("zz-median", MEDIAN)
    registry = Registry.load()
    assert registry.owner("strategies", "median") == "zz-median"
    assert cause in only_failure(registry).error


def test_an_interrupt_during_an_import_is_the_users(environment) -> None:
    environment.install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry.load()


def test_a_plugin_that_warns_when_imported_is_loaded(environment) -> None:
    environment.install("median-merge", f"import warnings; warnings.warn('an old torch')\n{MEDIAN}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry.load()
    assert "median" in registry.methods
    assert [str(warning.message) for warning in caught] == ["an old torch"]


def test_two_distributions_with_a_plugin_of_one_name_leave_the_first(environment) -> None:
    environment.install("a-median", MEDIAN, plugin="median")
    environment.install("b-median", MEDIAN.replace('"median"', '"middle"'), plugin="median")
    registry = Registry.load()
    assert "median" in registry.methods
    assert "middle" not in registry.methods
    failed = only_failure(registry)
    assert failed.distribution == "b-median"
    assert "name already registered" in failed.error.lower()


@pytest.mark.parametrize(
    ("group", "made_for", "remedy"),
    [
        (
            "mergekit_lowrank.v2",
            "was made for plugin API 2",
            ": upgrade mergekit-lowrank, or install a release of new-median for API 1.",
        ),
        ("mergekit_lowrank.v0", "was made for plugin API 0", ": install a release of new-median for API 1."),
        (
            "mergekit_lowrank",
            "is registered in the entry-point group 'mergekit_lowrank', which names no version of the plugin API",
            ". Its author registers it in the group 'mergekit_lowrank.v1'.",
        ),
    ],
    ids=["newer", "older", "no version"],
)
def test_a_plugin_for_another_api_version_is_named_and_not_imported(environment, group, made_for, remedy) -> None:
    environment.install("new-median", "raise AssertionError('imported')", version="3.0", group=group)
    environment.install("zz-median", MEDIAN)
    registry = Registry.load()
    speaks = f"mergekit-lowrank {__version__} speaks API 1. It was not imported"
    error = f"new-median 3.0 {made_for}; {speaks}{remedy}"
    assert only_failure(registry) == PluginRecord("new-median", "new-median", "3.0", error=error)
    assert "new_median" not in sys.modules
    assert "median" in registry.methods


@pytest.mark.parametrize("group", ["mergekit_lowrank.themes", "mergekit_lowrank_v1", "other", "mergekit_lowrank.v1x"])
def test_entry_points_of_other_groups_are_no_plugins(environment, group) -> None:
    environment.install("other", "raise AssertionError('imported')", group=group)
    assert Registry.load().plugins == Registry().plugins


@pytest.mark.parametrize("disabled", ["median", "median-merge", "all", "other, median", "median,"])
def test_plugins_can_be_disabled_by_their_name_or_their_distribution(environment, monkeypatch, disabled) -> None:
    environment.install("median-merge", f"{MEDIAN}\nraise AssertionError('imported')", plugin="median")
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", disabled)
    registry = Registry.load()
    assert registry.plugins[1:] == [PluginRecord("median", "median-merge", "1.2", is_disabled=True)]
    with pytest.raises(RecipeError, match=r"unknown merge_method 'median'.*plugins that are disabled: 'median'; see"):
        registry.method("median")


def test_names_to_disable_that_are_no_plugins_are_kept(environment, monkeypatch) -> None:
    environment.install("median-merge", MEDIAN)
    monkeypatch.setenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS", "medain,median-merge,all,mergekit-lowrank")
    assert Registry.load().unmatched == ("medain", "mergekit-lowrank")
    monkeypatch.delenv("MERGEKIT_LOWRANK_DISABLE_PLUGINS")
    assert Registry.load().unmatched == ()


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
