"""Presets of block weights, as the extension's own code reads them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import mergekit_lowrank_diffusion
import pytest
from click.testing import CliRunner
from mergekit_lowrank_diffusion import block_weights
from mergekit_lowrank_diffusion.__main__ import main
from mergekit_lowrank_diffusion.blocks import BASES, PRESETS, UNIFORM
from mergekit_lowrank_diffusion.names import Family, kohya_rule

from mergekit_lowrank import RecipeError, Registry, merge
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.testing import write_tiny_adapter

TIME = "unet.time_embedding.linear_1"


def value(weights: list[tuple[str, float]], module: str) -> float:
    """The first that matches, as a recipe reads it."""
    return next(own for pattern, own in weights if pattern == "*" or fnmatchcase(module, pattern.removeprefix("glob:")))


def module_of(block: str, leaf: str) -> str:
    """A module of a block, by the numbers that the block has in Stability's names."""
    place = {"I": "input_blocks_{}", "M": "middle_block", "O": "output_blocks_{}"}[block[0]]
    rule = kohya_rule(f"lora_unet_{place.format(int(block[-2:]))}_{leaf}", Family.SDXL)
    assert rule is not None
    return rule.modules[0]


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_each_of_all_blocks_has_the_weight_at_its_place(base: str) -> None:
    blocks = BASES[base][-1] if base == "sd15" else BASES[base][1]
    weights = block_weights(",".join(str(index / 8) for index in range(len(blocks))), base)
    assert value(weights, "text_encoder.text_model.encoder.layers.0.mlp.fc1") == 0.0
    levels = {"sd15": 4, "sdxl": 3}[base]
    convolutions = {f"IN{3 * level:02}" for level in range(1, levels)}
    for index, block in enumerate(blocks[1:], 1):
        leaves = ["0_0"] if block == "IN00" else ["0_op"] if block in convolutions else ["0_in_layers_2", "1_proj_in"]
        for leaf in leaves:
            module = "unet.conv_in" if block == "IN00" else module_of(block, leaf)
            assert value(weights, module) == index / 8, (block, module)
    assert value(weights, TIME) == 1.0


@pytest.mark.parametrize(
    ("preset", "block", "expected"),
    [
        ("INS", "IN04", 1.0),
        ("INS", "IN05", 0.0),
        ("IND", "IN05", 1.0),
        ("IND", "IN02", 0.0),
        ("INALL", "M00", 0.0),
        ("MIDD", "M00", 1.0),
        ("MIDD", "OUT06", 1.0),
        ("MIDD", "OUT07", 0.0),
        ("OUTD", "OUT03", 1.0),
        ("OUTS", "OUT06", 0.0),
        ("OUTS", "OUT07", 1.0),
        ("OUTALL", "OUT11", 1.0),
        ("ALL0.5", "OUT11", 0.5),
        ("NONE", "M00", 0.0),
        ("ALL", "IN01", 1.0),
    ],
)
def test_presets_are_those_of_the_extension(preset: str, block: str, expected: float) -> None:
    assert value(block_weights(preset, "sd15"), module_of(block, "1_proj_in")) == expected


def test_blocks_that_a_list_leaves_out_weigh_nothing() -> None:
    weights = block_weights("1,1,1,1,1,1,1,1,1,1,1,1", "sdxl")
    assert value(weights, module_of("IN04", "1_proj_in")) == 1.0
    assert value(weights, module_of("IN01", "0_in_layers_2")) == 0.0


def test_flux_has_a_weight_for_each_of_its_blocks() -> None:
    weights = block_weights(",".join(str(index) for index in range(61)), "flux")
    expected = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 0,
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": 1,
        "transformer.x_embedder": 2,
        "transformer.transformer_blocks.1.attn.to_q": 4,
        "transformer.transformer_blocks.18.attn.to_q": 21,
        "transformer.single_transformer_blocks.1.proj_mlp": 23,
        "transformer.single_transformer_blocks.37.proj_mlp": 59,
        "transformer.proj_out": 60,
    }
    assert {module: value(weights, module) for module in expected} == expected


@pytest.mark.parametrize(
    ("preset", "base", "message"),
    [
        ("INS", "sdxl", "preset 'INS' has 17 values; for --base sdxl give 12 or 20 or 26 of them, or one of NONE"),
        ("1,2,3", "sd15", "3 values; for --base sd15 give 17 or 26"),
        ("INX", "sd15", "'INX' is neither a preset nor numbers"),
        ("nan," * 16 + "1", "sd15", "'nan' is no finite number"),
        ("ALL", "sd3", "--base is 'sd3'; expected one of sd15, sd21, sdxl, flux"),
    ],
)
def test_what_is_no_list_of_blocks_is_refused(preset: str, base: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        block_weights(preset, base)


@pytest.mark.parametrize("preset", [*PRESETS, *UNIFORM])
def test_every_preset_prints_a_weights_file(preset: str) -> None:
    result = CliRunner().invoke(main, [preset, "--base", "sd15"])
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert lines[0] == "pattern,value"
    assert lines[-1] == "*,1"
    assert len({line.rpartition(",")[0] for line in lines}) == len(lines)


def test_a_wrong_preset_ends_with_status_2() -> None:
    result = CliRunner().invoke(main, ["INX", "--base", "sd15"])
    assert result.exit_code == 2
    assert result.output.startswith("error: 'INX' is neither a preset")


def test_a_recipe_reads_the_weights_file(tmp_path: Path) -> None:
    registry = Registry()
    registry.register(mergekit_lowrank_diffusion, "diffusion")
    modules = {module_of(block, "1_proj_in"): (6, 4) for block in ("IN01", "OUT11")}
    adapter = write_tiny_adapter(tmp_path / "a", modules, lora_alpha=2)
    (tmp_path / "weights.csv").write_text(CliRunner().invoke(main, ["INS", "--base", "sd15"]).output, encoding="utf-8")
    weight = {"file": str(tmp_path / "weights.csv")}
    recipe = {"merge_method": "task_arithmetic", "models": [{"model": str(adapter), "parameters": {"weight": weight}}]}
    merged = merge(recipe, registry=registry).open(label="merged")
    sizes = {module: float(densify(merged.read(module)).abs().max()) for module in modules}
    assert [size > 0 for size in sizes.values()] == [True, False]
