"""The grammar of names, over the key lists of the tools.

The lists are built as the tools build them, and their lengths are those that the tools print: sd-scripts (2025)
``networks/lora.py`` ("create LoRA for U-Net: 192 modules", 72 of the text encoder; of SDXL 722, 72 and 192) and
``networks/lora_flux.py`` ("create LoRA for FLUX all blocks: 304 modules"); diffusers 0.42's own names of the modules.
"""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergekit_lowrank_diffusion.names import (
    Family,
    component_of,
    documented,
    family_of,
    kohya_rule,
    module_rule,
)

ATTENTION = [f"attn{n}_{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out_0")]
DOWN, MID = "unet.down_blocks.2.attentions.0", "unet.mid_block.attentions.0"
BLOCK = [*ATTENTION, "ff_net_0_proj", "ff_net_2"]


def transformer(place: str, depth: int) -> list[str]:
    blocks = [f"{place}_transformer_blocks_{i}_{leaf}" for i in range(depth) for leaf in BLOCK]
    return [f"{place}_proj_in", *blocks, f"{place}_proj_out"]


def clip(prefix: str, layers: int) -> list[str]:
    leaves = [*(f"self_attn_{leaf}_proj" for leaf in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
    return [f"{prefix}_text_model_encoder_layers_{i}_{leaf}" for i in range(layers) for leaf in leaves]


def sd_unet() -> list[str]:
    places = [f"down_blocks_{b}_attentions_{i}" for b in range(3) for i in range(2)] + ["mid_block_attentions_0"]
    places += [f"up_blocks_{b}_attentions_{i}" for b in range(1, 4) for i in range(3)]
    return [f"lora_unet_{name}" for place in places for name in transformer(place, 1)]


def sdxl_unet() -> list[str]:
    places = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    places |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    return [f"lora_unet_{name}" for place, depth in places.items() for name in transformer(place, depth)]


def flux() -> list[str]:
    double = [
        f"{side}_{leaf}" for side in ("img", "txt") for leaf in ("attn_proj", "attn_qkv", "mlp_0", "mlp_2", "mod_lin")
    ]
    single = ("linear1", "linear2", "modulation_lin")
    names = [f"double_blocks_{i}_{leaf}" for i in range(19) for leaf in double]
    names += [f"single_blocks_{i}_{leaf}" for i in range(38) for leaf in single]
    return [f"lora_unet_{name}" for name in names]


def t5() -> list[str]:
    attention = [f"layer_0_SelfAttention_{leaf}" for leaf in "qkvo"]
    feed = [f"layer_1_DenseReluDense_{leaf}" for leaf in ("wi_0", "wi_1", "wo")]
    return [f"lora_te3_encoder_block_{i}_{leaf}" for i in range(24) for leaf in (*attention, *feed)]


SDXL_CONVOLUTIONS = {
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_2_0_out_layers_3": "unet.down_blocks.0.resnets.1.conv2",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_input_blocks_8_0_emb_layers_1": "unet.down_blocks.2.resnets.1.time_emb_proj",
    "lora_unet_middle_block_0_in_layers_2": "unet.mid_block.resnets.0.conv1",
    "lora_unet_middle_block_2_in_layers_2": "unet.mid_block.resnets.1.conv1",
    "lora_unet_output_blocks_0_0_in_layers_2": "unet.up_blocks.0.resnets.0.conv1",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_8_0_out_layers_3": "unet.up_blocks.2.resnets.2.conv2",
    "lora_unet_time_embed_0": "unet.time_embedding.linear_1",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_unet_out_2": "unet.conv_out",
}

LISTS = {
    "SD": (Family.SD, [*sd_unet(), *clip("lora_te", 12)], 264),
    "SDXL": (Family.SDXL, [*sdxl_unet(), *clip("lora_te1", 12), *clip("lora_te2", 32)], 986),
    "SDXL LoCon": (Family.SDXL, [*sdxl_unet(), *SDXL_CONVOLUTIONS], 736),
    "Flux": (Family.FLUX, [*flux(), *clip("lora_te1", 12), *t5()], 304 + 72 + 168),
}


@pytest.mark.parametrize(("family", "names", "count"), LISTS.values(), ids=LISTS)
def test_every_documented_name_is_read_and_written_back(family: Family, names: list[str], count: int) -> None:
    assert len(names) == count
    assert family_of(names) is family
    rules = [kohya_rule(name, family) for name in names]
    modules = list(chain.from_iterable(rule.modules for rule in rules if rule))
    assert len(set(modules)) == sum(len(rule.modules) for rule in rules if rule) >= count
    assert {rule.stored for module in modules if (rule := module_rule(module, family))} == set(names)


@pytest.mark.parametrize(("stored", "module"), SDXL_CONVOLUTIONS.items())
def test_sgm_blocks_have_their_places_in_diffusers(stored: str, module: str) -> None:
    rule = kohya_rule(stored, Family.SDXL)
    assert rule is not None
    assert rule.modules == (module,)


@pytest.mark.parametrize(
    ("stored", "module"),
    [
        (
            "lora_unet_input_blocks_7_1_transformer_blocks_9_attn2_to_out_0",
            f"{DOWN}.transformer_blocks.9.attn2.to_out.0",
        ),
        ("lora_unet_output_blocks_5_1_proj_in", "unet.up_blocks.1.attentions.2.proj_in"),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
            f"{MID}.transformer_blocks.0.ff.net.0.proj",
        ),
        ("lora_te_text_model_encoder_layers_11_mlp_fc2", "text_encoder.text_model.encoder.layers.11.mlp.fc2"),
        ("lora_transformer_single_transformer_blocks_3_attn_to_q", "transformer.single_transformer_blocks.3.attn.to_q"),
    ],
)
def test_a_name_of_any_tool_means_the_module_of_diffusers(stored: str, module: str) -> None:
    rule = kohya_rule(stored, None)
    assert rule is not None
    assert rule.modules == (module,)


def test_the_fused_layers_of_flux_hold_their_parts_in_the_order_of_their_rows() -> None:
    rule = kohya_rule("lora_unet_single_blocks_37_linear1", Family.FLUX)
    assert rule is not None
    place = "transformer.single_transformer_blocks.37"
    assert rule.modules == (f"{place}.attn.to_q", f"{place}.attn.to_k", f"{place}.attn.to_v", f"{place}.proj_mlp")
    assert rule.shares == (1, 1, 1, 4)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_unet_down_blocks_0_attentions_0_proj_in_extra",
        "lora_unet_final_layer_adaLN_modulation_1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ],
)
def test_a_name_outside_the_documented_ones_is_never_guessed(name: str) -> None:
    assert kohya_rule(name, None) is None


@given(st.sampled_from(Family), st.data())
def test_dots_to_underscores_to_dots_is_the_identity(family: Family, data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from(documented(family)))
    template = data.draw(st.sampled_from(rule.modules))
    numbers = st.integers(0, 99).map(str)
    module = "".join(data.draw(numbers) if letter == "#" else letter for letter in template)
    written = module_rule(module, family)
    assert written is not None
    assert module in written.modules
    read = kohya_rule(written.stored, family)
    assert read == written


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet"),
        ("single_transformer_blocks.0.proj_mlp", "transformer"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("transformer.blocks.0.attn1.to_q", "transformer"),
        ("transformer.h.0.attn.c_attn", None),
        ("transformer.blocks.0.attn.Wqkv", None),
        ("model.layers.0.self_attn.q_proj", None),
        ("text_model.encoder.layers.0.mlp.fc1", None),
    ],
)
def test_the_component_of_a_name_is_known_or_not(module: str, component: str | None) -> None:
    assert component_of(module) == component


@pytest.mark.parametrize(
    ("names", "widths", "family"),
    [
        (["unet.mid_block.attentions.0.proj_in"], [], None),
        (["unet.mid_block.attentions.0.proj_in"], [2048], Family.SDXL),
        (["unet.mid_block.attentions.0.proj_in"], [768], Family.SD),
        (["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"], [], Family.SDXL),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], [], Family.SDXL),
        (["transformer.single_transformer_blocks.0.proj_mlp"], [], Family.FLUX),
    ],
)
def test_the_family_is_told_by_names_and_widths(names: list[str], widths: list[int], family: Family | None) -> None:
    assert family_of(names, widths) is family
