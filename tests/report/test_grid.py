"""Modules as a table of types and layers."""

import pytest

from mergekit_lowrank.report.grid import grid, layer_and_kind


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("encoder.layer.11.attention.self.query", (11, "attention.self.query")),
        ("transformer.h.0.mlp.c_fc", (0, "mlp.c_fc")),
        ("encoder.block.2.layer.1.DenseReluDense.wi", (2, "layer.1.DenseReluDense.wi")),
        ("model.layers.7.mlp.experts.12.up_proj", (7, "mlp.experts.12.up_proj")),
        ("down_blocks.1.attentions.0.to_q", (1, "attentions.0.to_q")),
        ("0.q_proj", (0, "q_proj")),
        ("lm_head", (None, "lm_head")),
        ("mm_projector.2", (None, "mm_projector.2")),
        ("model.embed_tokens.weight[128009]", (None, "model.embed_tokens.weight[128009]")),
    ],
)
def test_a_name_is_a_layer_and_what_follows_it(module: str, expected: tuple[int | None, str]) -> None:
    assert layer_and_kind(module) == expected


def test_types_are_rows_and_layers_are_columns_in_numeric_order() -> None:
    modules = ["m.layers.10.q", "m.layers.2.q", "m.layers.2.v"]
    assert grid(modules, [1.0, 2.0, 3.0]) == (("q", "v"), ("2", "10"), ((2.0, 1.0), (3.0, None)))


def test_a_module_without_a_layer_has_a_row_and_a_column_of_its_own() -> None:
    rows, columns, values = grid(["embed", "m.layers.0.q"], [5.0, 1.0])
    assert (rows, columns) == (("q", "embed"), ("-", "0"))
    assert values == ((None, 1.0), (5.0, None))


def test_a_missing_value_stays_missing() -> None:
    assert grid(["m.layers.0.q"], [None])[2] == ((None,),)


def test_towers_that_share_a_type_are_told_apart() -> None:
    modules = ["text.layers.0.q", "vision.layers.0.q", "text.layers.0.gate"]
    assert grid(modules, [1.0, 2.0, 3.0])[0] == ("text.layers.*.q", "vision.layers.*.q", "gate")


def test_very_many_experts_share_a_row_that_holds_their_mean() -> None:
    modules = [f"m.layers.0.experts.{index}.up" for index in range(200)]
    assert grid(modules, [float(index) for index in range(200)]) == (("experts.*.up",), ("0",), ((99.5,),))


def test_no_modules_are_an_empty_table() -> None:
    assert grid([], []) == ((), (), ())
