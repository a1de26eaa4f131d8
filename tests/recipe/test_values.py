from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.recipe import Depths, Filtered, Value, leaves, matches, resolve, unused_filters

finite = st.floats(allow_nan=False, allow_infinity=False)
points = st.lists(finite, min_size=1, max_size=6).map(tuple)
unit = st.floats(min_value=0, max_value=1)


@pytest.mark.parametrize("scalar", [1, 0.5, True, "sum"])
def test_a_scalar_is_the_same_for_every_module(scalar: Value) -> None:
    assert resolve(scalar, "layers.3.q", depth=0.3) is scalar


@pytest.mark.parametrize(("depth", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)])
def test_a_gradient_interpolates_between_equally_spaced_points(depth: float, value: float) -> None:
    assert resolve((0.0, 1.0, 0.5), "m", depth=depth) == value


def test_a_gradient_of_one_point_is_constant() -> None:
    assert resolve((0.3,), "m", depth=0.7) == 0.3


@given(points, unit)
def test_a_gradient_never_leaves_the_hull_of_its_points(gradient: tuple[float, ...], depth: float) -> None:
    value = resolve(gradient, "m", depth=depth)
    assert isinstance(value, float)
    assert min(gradient) <= value <= max(gradient)


@given(points)
def test_a_gradient_is_exact_at_both_ends(gradient: tuple[float, ...]) -> None:
    assert resolve(gradient, "m", depth=0.0) == gradient[0]
    assert resolve(gradient, "m", depth=1.0) == gradient[-1]


def test_the_first_filter_that_matches_wins() -> None:
    value = (Filtered(filter="q_proj", value=1), Filtered(filter="proj", value=2))
    assert resolve(value, "layers.0.q_proj", depth=0) == 1
    assert resolve(value, "layers.0.k_proj", depth=0) == 2


def test_a_filtered_gradient_interpolates() -> None:
    assert resolve((Filtered(filter="q", value=(0, 1)),), "q", depth=0.5) == 0.5


@pytest.mark.parametrize("default", [None, "*"])
def test_no_filter_or_a_star_takes_every_module(default: str | None) -> None:
    assert resolve((Filtered(filter=default, value=7),), "anything", depth=0) == 7


def test_without_a_match_the_next_source_is_asked() -> None:
    assert resolve((Filtered(filter="q", value=1),), "mlp", depth=0) is None


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("q_proj", "layers.0.q_proj.x", True),
        ("*", "anything", True),
        ("q.proj", "q_proj", False),
        ("glob:layers.*.q_proj", "layers.10.q_proj", True),
        ("glob:q_proj", "layers.0.q_proj", False),
        ("glob:*.Q_PROJ", "layers.0.q_proj", False),
        (r"regex:layers\.[0-3]\.", "model.layers.2.mlp", True),
        (r"regex:^layers", "model.layers.2.mlp", False),
        ("globe", "a.globe", True),
    ],
)
def test_a_pattern_matches(pattern: str, module: str, expected: bool) -> None:
    assert matches(pattern, module) is expected


def test_leaves_are_given_with_the_way_to_them() -> None:
    value = (Filtered(filter="q", value=(0.1, 0.2)), Filtered(value="x"))
    assert list(leaves(value)) == [((0, "value", 0), 0.1), ((0, "value", 1), 0.2), ((1, "value"), "x")]
    assert list(leaves((1.0,))) == [((0,), 1.0)]
    assert list(leaves(3)) == [((), 3)]


def test_depth_is_the_layers_index_over_the_last_one() -> None:
    depths = Depths(f"model.layers.{n}.mlp" for n in range(5))
    assert [depths.of(f"model.layers.{n}.mlp") for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("part", ["layers", "layer", "h", "blocks", "block"])
def test_layers_are_found_under_each_usual_name(part: str) -> None:
    assert Depths([f"x.{part}.0.y", f"x.{part}.4.y", f"x.{part}.2"]).of(f"x.{part}.2") == 0.5


def test_towers_are_counted_apart() -> None:
    depths = Depths(["vision.layers.2.q", "text.layers.2.q", "text.layers.4.q"])
    assert depths.of("vision.layers.2.q") == 1.0
    assert depths.of("text.layers.2.q") == 0.5


def test_only_the_first_layer_index_in_a_name_counts() -> None:
    depths = Depths(["block.0.layer.1.q", "block.2.layer.0.q", "block.1.layer.0.q"])
    assert depths.of("block.1.layer.0.q") == 0.5


def test_a_single_layer_has_depth_zero() -> None:
    assert Depths(["layers.0.q"]).of("layers.0.q") == 0.0


@pytest.mark.parametrize(
    ("module", "depth"),
    [
        ("model.embed_tokens", 0.0),
        ("embeddings.word_embeddings", 0.0),
        ("transformer.wte", 0.0),
        ("vision.patch_embedding", 0.0),
        ("unet.conv_in", 0.0),
        ("lm_head", 1.0),
        ("gpt_neox.embed_out", 1.0),
        ("model.norm", 1.0),
        ("multi_modal_projector.linear_1", 1.0),
        ("system.out", 1.0),
    ],
)
def test_modules_outside_the_layers_take_an_end(module: str, depth: float) -> None:
    assert Depths([module, "layers.0.q", "layers.1.q"]).of(module) == depth


def test_depth_does_not_depend_on_the_order_of_modules() -> None:
    modules = ["layers.0.q", "layers.7.q", "layers.3.q"]
    found = {tuple(Depths(order).of(m) for m in modules) for order in itertools.permutations(modules)}
    assert found == {(0.0, 1.0, 3 / 7)}


def test_filters_that_take_no_module_are_found() -> None:
    value = tuple(Filtered(filter=own, value=1) for own in ("mlp", "regex:q_proj$", "glob:*.q_proj", "head", "*"))
    assert unused_filters(value, ["layers.0.q_proj", "layers.0.mlp.up"]) == ["glob:*.q_proj", "head"]
    assert unused_filters(value, ["lm_head"]) == ["mlp", "regex:q_proj$", "glob:*.q_proj"]


@pytest.mark.parametrize("value", [1, (0.0, 1.0), (Filtered(value=1),), (Filtered(filter="*", value=1),)])
def test_without_filters_none_is_unused(value: Value) -> None:
    assert unused_filters(value, ["q"]) == []
