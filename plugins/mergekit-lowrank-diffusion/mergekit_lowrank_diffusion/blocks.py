"""Weights by block, as the block-weight extensions of Stable Diffusion user interfaces have them, by module.

Source: hako-mikan's sd-webui-lora-block-weight, ``scripts/lora_block_weight.py`` (2025): the names of the blocks, the
lists of 12, 17, 20, 26 and 61 of them, the presets, and 0 for blocks that a list leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mergekit_lowrank import RecipeError

__all__ = ["BASES", "PRESETS", "block_weights"]

_INPUTS, _OUTPUTS = (tuple(f"{kind}{index:02}" for index in range(12)) for kind in ("IN", "OUT"))
_ALL_26 = ("BASE", *_INPUTS, "M00", *_OUTPUTS)
_SD_17 = ("BASE", *(_INPUTS[i] for i in (1, 2, 4, 5, 7, 8)), "M00", *_OUTPUTS[3:])
_SDXL_12 = ("BASE", *(_INPUTS[i] for i in (4, 5, 7, 8)), "M00", *_OUTPUTS[:6])
_SDXL_20 = ("BASE", *_INPUTS[:9], "M00", *_OUTPUTS[:9])
_FLUX_61 = ("CLIP", "T5", "IN", *(f"D{i:02}" for i in range(19)), *(f"S{i:02}" for i in range(38)), "OUT")

BASES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sd15": (_SD_17, _ALL_26),
    "sd21": (_SD_17, _ALL_26),
    "sdxl": (_SDXL_12, _SDXL_20, _ALL_26),
    "flux": (_FLUX_61,),
}
"""The lists of blocks that are in use for each base model."""

PRESETS: Mapping[str, str] = {
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}
"""Over the 17 blocks of SD 1.x and 2.x."""
UNIFORM: Mapping[str, float] = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
"""Over all blocks of any base model."""

_LAYERS = 3
"""Places in a level of the UNet: two layers of the encoder and what halves the size, three layers of the decoder."""


def block_weights(preset: str, base: str) -> list[tuple[str, float]]:
    """(pattern, value) by module, for ``weight: {file: …}``; the first pattern that matches counts.

    Modules outside of all blocks, such as the time embedding, have weight 1; blocks that a list leaves out 0.

    Args:
        preset: a name, or the values themselves with commas between them.
        base: one of ``BASES``.

    Raises:
        RecipeError: there is no such preset or base, or a list of another length than those in use for the base.
    """
    if base not in BASES:
        raise RecipeError(f"--base is '{base}'; expected one of {', '.join(BASES)}")
    values = dict.fromkeys(BASES[base][-1], 0.0) | _values(preset, base)
    patterns = _flux_patterns() if base == "flux" else _unet_patterns(3 if base == "sdxl" else 4)
    return [*((f"glob:{glob}", values[block]) for block, glob in patterns if block in values), ("*", 1.0)]


def _values(preset: str, base: str) -> dict[str, float]:
    """The value of each block that the preset names."""
    if preset in UNIFORM:
        return dict.fromkeys(BASES[base][-1], UNIFORM[preset])
    numbers = _numbers(PRESETS.get(preset, preset))
    found = next((blocks for blocks in BASES[base] if len(blocks) == len(numbers)), None)
    if found is None:
        lengths = " or ".join(str(len(blocks)) for blocks in BASES[base])
        what = f"preset '{preset}' has {len(numbers)} values" if preset in PRESETS else f"{len(numbers)} values"
        raise RecipeError(f"{what}; for --base {base} give {lengths} of them, or one of {', '.join(UNIFORM)}")
    return dict(zip(found, numbers, strict=True))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        known = ", ".join((*UNIFORM, *PRESETS))
        raise RecipeError(
            f"'{text}' is neither a preset nor numbers with commas between them; presets: {known}"
        ) from None
    wrong = next((number for number in numbers if not math.isfinite(number)), None)
    if wrong is not None:
        raise RecipeError(f"'{wrong}' is no finite number")
    return numbers


def _unet_patterns(levels: int) -> Iterator[tuple[str, str]]:
    """(block, pattern of its modules), by the places of diffusers' UNet2DConditionModel."""
    yield from (("BASE", "text_encoder.*"), ("BASE", "text_encoder_2.*"), ("IN00", "unet.conv_in"))
    for index in range(1, _LAYERS * levels):
        level, layer = divmod(index - 1, _LAYERS)
        below = ("downsamplers.0",) if layer == _LAYERS - 1 else (f"resnets.{layer}", f"attentions.{layer}")
        yield from ((_INPUTS[index], f"unet.down_blocks.{level}.{place}.*") for place in below)
    yield "M00", "unet.mid_block.*"
    for index in range(_LAYERS * levels):
        level, layer = divmod(index, _LAYERS)
        above = ("upsamplers.0",) if layer == _LAYERS - 1 and level < levels - 1 else ()
        places = (f"resnets.{layer}", f"attentions.{layer}", *above)
        yield from ((_OUTPUTS[index], f"unet.up_blocks.{level}.{place}.*") for place in places)


def _flux_patterns() -> Iterator[tuple[str, str]]:
    """The same by the places of diffusers' FluxTransformer2DModel."""
    yield from (("CLIP", "text_encoder.*"), ("T5", "text_encoder_2.*"))
    yield from (("IN", f"transformer.{name}") for name in ("x_embedder", "context_embedder", "time_text_embed.*"))
    yield from ((f"D{i:02}", f"transformer.transformer_blocks.{i}.*") for i in range(19))
    yield from ((f"S{i:02}", f"transformer.single_transformer_blocks.{i}.*") for i in range(38))
    last = ("transformer.proj_out", "transformer.norm_out.*", "lora_unet_final_layer_adaLN_modulation_1")
    yield from (("OUT", name) for name in last)


def as_csv(weights: Sequence[tuple[str, float]]) -> str:
    """The text of the file."""
    return "\n".join(("pattern,value", *(f"{pattern},{value:g}" for pattern, value in weights)))
