"""The names of modules: diffusers' dots to kohya's underscores and back, by the names that the tools document.

Underscores alone cannot be turned back (``to_q`` or ``to.q``?), so each name is looked up among templates, in which
``#`` stands for a number. A name that fits none is kept as it is: never guessed at.

Sources: sd-scripts (2025) ``networks/lora.py``, ``networks/lora_flux.py`` and ``library/sdxl_model_util.py``; diffusers
0.42 ``loaders/lora_conversion_utils.py``; transformers' CLIPTextModel and T5EncoderModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

__all__ = [
    "COMPONENTS",
    "KOHYA_PREFIXES",
    "Family",
    "Rule",
    "component_of",
    "documented",
    "family_of",
    "kohya_rule",
    "module_rule",
]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a diffusers pipeline that have LoRAs."""

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_")

_ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
)
_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
_RESNET |= {"conv_shortcut": "skip_connection"}
_UNET_ENDS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_CLIP = (
    *(f"text_model.encoder.layers.#.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "text_model.encoder.layers.#.mlp.fc1",
    "text_model.encoder.layers.#.mlp.fc2",
    "text_projection",
)
_T5 = (
    *(f"encoder.block.#.layer.0.SelfAttention.{leaf}" for leaf in "qkvo"),
    *(f"encoder.block.#.layer.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo")),
)
_QKV = ("to_q", "to_k", "to_v")
_FLUX_FUSED = {
    "double_blocks_#_img_attn_qkv": tuple(f"transformer_blocks.#.attn.{leaf}" for leaf in _QKV),
    "double_blocks_#_txt_attn_qkv": tuple(f"transformer_blocks.#.attn.add_{leaf}_proj" for leaf in "qkv"),
    "single_blocks_#_linear1": (
        *(f"single_transformer_blocks.#.attn.{leaf}" for leaf in _QKV),
        "single_transformer_blocks.#.proj_mlp",
    ),
}
_FLUX = {
    "double_blocks_#_img_attn_proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks_#_img_mlp_0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks_#_img_mlp_2": "transformer_blocks.#.ff.net.2",
    "double_blocks_#_img_mod_lin": "transformer_blocks.#.norm1.linear",
    "double_blocks_#_txt_attn_proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks_#_txt_mlp_0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks_#_txt_mlp_2": "transformer_blocks.#.ff_context.net.2",
    "double_blocks_#_txt_mod_lin": "transformer_blocks.#.norm1_context.linear",
    "single_blocks_#_linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks_#_modulation_lin": "single_transformer_blocks.#.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
_MLP_SHARE = 4
"""``proj_mlp`` has four times the rows of ``to_q`` in Flux: 12288 and 3072."""
_LAYERS_PER_BLOCK = 2
_LEVELS = 4
"""Of the UNet of SD 1.x and 2.x; that of SDXL has three, and names of the fourth do not occur."""


class Family(Enum):
    """Base models whose kohya files are named alike."""

    SD = "SD 1.x and 2.x"
    SDXL = "SDXL"
    FLUX = "Flux"


@dataclass(frozen=True)
class Rule:
    """A name in a kohya file, and the modules whose updates it holds; ``#`` stands for a number.

    Attributes:
        stored: kohya's name.
        modules: diffusers' names, with the component first; several where a layer is fused.
        shares: how the rows of B are divided among them.
    """

    stored: str
    modules: tuple[str, ...]
    shares: tuple[int, ...] = (1,)

    def filled(self, template: str, name: str) -> Rule | None:
        """The rule with the numbers that ``name`` has where ``template``, one of its own, has ``#``."""
        match = _pattern(template).fullmatch(name)
        if match is None:
            return None
        modules = tuple(_fill(module, match.groups()) for module in self.modules)
        return replace(self, stored=_fill(self.stored, match.groups()), modules=modules)


def kohya_rule(stored: str, family: Family | None) -> Rule | None:
    """What a name in a kohya file holds; None for a name that is not documented.

    Args:
        stored: such as ``lora_unet_down_blocks_0_attentions_0_proj_in``.
        family: of the file, which says which encoder ``lora_te3`` is; None when it cannot be told.
    """
    candidates = _by_stored(family).get(_shape(stored), ())
    return next((found for rule in candidates if (found := rule.filled(rule.stored, stored))), None)


def module_rule(module: str, family: Family) -> Rule | None:
    """Where kohya's tools store a module of diffusers; None for a name that is not documented."""
    candidates = _by_module(family).get(_shape(module), ())
    found = (rule.filled(template, module) for rule in candidates for template in rule.modules)
    return next((rule for rule in found if rule), None)


def component_of(module: str) -> str | None:
    """The component that a name starts with, or the one that a name without any must belong to; None of other models.

    Text encoders are not told apart by their names, so one without its component is not known.
    """
    first = module.partition(".")[0]
    if first in COMPONENTS:
        return None if _LANGUAGE_MODEL.match(module) else first
    owners = {"unet": Family.SDXL, "transformer": Family.FLUX}
    return next((own for own, family in owners.items() if module_rule(f"{own}.{module}", family)), None)


def family_of(names: Iterable[str], widths: Iterable[int] = ()) -> Family | None:
    """The family that names show, kohya's or diffusers'; None where they fit several.

    Args:
        names: of modules.
        widths: d_in of the cross attention's keys, which are the widths of the text encoders.
    """
    names = list(names)
    by_width = [_FAMILY_BY_WIDTH[width] for width in widths if width in _FAMILY_BY_WIDTH]
    shown = [family for family, sign in _SIGNS if any(sign.search(name) for name in names)]
    return next(iter((*by_width, *shown)), None)


def documented(family: Family) -> tuple[Rule, ...]:
    """All rules of a family, the first of those that store one module being the one that its tools write."""
    return (*_image_rules(family), *_text_rules(family))


_LANGUAGE_MODEL = re.compile(r"transformer\.(h|wte|wpe|word_embeddings|blocks\.\d+\.attn\.Wqkv)\b")
"""GPT-2's, Falcon's, BLOOM's and MPT's names, which start with ``transformer`` too."""

_FAMILY_BY_WIDTH = {768: Family.SD, 1024: Family.SD, 2048: Family.SDXL}
_SIGNS = (
    (Family.FLUX, re.compile(r"^lora_unet_(double|single)_blocks_|^transformer\.(single_)?transformer_blocks\.")),
    (Family.SDXL, re.compile(r"^(lora_te2_|text_encoder_2\.text_model|unet\.add_embedding|lora_unet_label_emb)")),
    (Family.SDXL, re.compile(r"^unet\.(down|mid|up)_block.*\.transformer_blocks\.[1-9]")),
    (Family.SDXL, re.compile(r"^lora_unet_(input|middle|output)_block.*_transformer_blocks_[1-9]")),
    (Family.SD, re.compile(r"^lora_te_|^unet\.(down_blocks\.0\.attentions|(down|up)_blocks\.3)")),
)


def _image_rules(family: Family) -> Iterator[Rule]:
    """Of the UNet or the transformer, as the family's tools write them."""
    if family is Family.FLUX:
        for stored, parts in _FLUX_FUSED.items():
            shares = tuple(_MLP_SHARE if part.endswith("proj_mlp") else 1 for part in parts)
            yield Rule(f"lora_unet_{stored}", tuple(f"transformer.{part}" for part in parts), shares)
        for stored, module in _FLUX.items():
            yield Rule(f"lora_unet_{stored}", (f"transformer.{module}",))
        return
    if family is Family.SDXL:
        yield from (Rule(f"lora_unet_{stored}", (f"unet.{module}",)) for stored, module in _sgm())
    yield from (Rule(f"lora_unet_{_underscored(module)}", (f"unet.{module}",)) for module in _unet())


def _text_rules(family: Family) -> Iterator[Rule]:
    """Of the text encoders."""
    if family is Family.SD:
        yield from _encoder("lora_te", "text_encoder", _CLIP)
    yield from _encoder("lora_te1", "text_encoder", _CLIP)
    if family is Family.SDXL:
        yield from _encoder("lora_te2", "text_encoder_2", _CLIP)
        yield from _encoder("lora_te", "text_encoder", _CLIP)
    if family is Family.FLUX:
        yield from _encoder("lora_te3", "text_encoder_2", _T5)


def _encoder(prefix: str, component: str, modules: Sequence[str]) -> Iterator[Rule]:
    yield from (Rule(f"{prefix}_{_underscored(module)}", (f"{component}.{module}",)) for module in modules)


def _other_rules() -> Iterator[Rule]:
    """What is read and never written: diffusers' own names of Flux, as OneTrainer stores them."""
    flux = (*_FLUX.values(), *(part for parts in _FLUX_FUSED.values() for part in parts))
    yield from (Rule(f"lora_transformer_{_underscored(name)}", (f"transformer.{name}",)) for name in flux)


def _unet() -> Iterator[str]:
    yield from _UNET_ENDS
    for place in ("down_blocks.#", "mid_block", "up_blocks.#"):
        yield from (f"{place}.attentions.#.{leaf}" for leaf in _ATTENTION)
        yield from (f"{place}.resnets.#.{leaf}" for leaf in _RESNET)
    yield from ("down_blocks.#.downsamplers.0.conv", "up_blocks.#.upsamplers.0.conv")


def _sgm() -> Iterator[tuple[str, str]]:
    """The names of the UNet as Stability's code has them, which sd-scripts writes for SDXL, with diffusers' own."""
    yield from ((stored, module) for module, stored in _UNET_ENDS.items())
    for place, resnet, attention in _sgm_places():
        yield from ((f"{resnet}_{stored}", f"{place[0]}.{leaf}") for leaf, stored in _RESNET.items())
        yield from ((f"{attention}_{_underscored(leaf)}", f"{place[1]}.{leaf}") for leaf in _ATTENTION)
    for level in range(_LEVELS - 1):
        last = (_LAYERS_PER_BLOCK + 1) * (level + 1)
        yield f"input_blocks_{last}_0_op", f"down_blocks.{level}.downsamplers.0.conv"
        yield from ((f"output_blocks_{last - 1}_{n}_conv", f"up_blocks.{level}.upsamplers.0.conv") for n in (2, 1))


def _sgm_places() -> Iterator[tuple[tuple[str, str], str, str]]:
    """((resnet, attention) of diffusers, resnet, attention) for each place in the UNet."""
    for level in range(_LEVELS):
        for layer in range(_LAYERS_PER_BLOCK + 1):
            up, block = f"up_blocks.{level}", (_LAYERS_PER_BLOCK + 1) * level + layer
            places = (f"{up}.resnets.{layer}", f"{up}.attentions.{layer}")
            yield places, f"output_blocks_{block}_0", f"output_blocks_{block}_1"
            if layer < _LAYERS_PER_BLOCK:
                down = f"down_blocks.{level}"
                places = (f"{down}.resnets.{layer}", f"{down}.attentions.{layer}")
                yield places, f"input_blocks_{block + 1}_0", f"input_blocks_{block + 1}_1"
    yield ("mid_block.resnets.0", "mid_block.attentions.0"), "middle_block_0", "middle_block_1"
    yield ("mid_block.resnets.1", "mid_block.attentions.0"), "middle_block_2", "middle_block_1"


@cache
def _by_stored(family: Family | None) -> Mapping[str, tuple[Rule, ...]]:
    """The rules to read with, by kohya's names without their numbers; those of the family first."""
    families = sorted(Family, key=lambda own: own is not family)
    rules = [rule for own in families for rule in _image_rules(own)]
    rules += [rule for own in families for rule in _text_rules(own) if own is family or "lora_te3" not in rule.stored]
    found: dict[str, list[Rule]] = {}
    for rule in (*rules, *_other_rules()):
        found.setdefault(_shape(rule.stored), []).append(rule)
    return {shape: tuple(own) for shape, own in found.items()}


@cache
def _by_module(family: Family) -> Mapping[str, tuple[Rule, ...]]:
    """The rules to write with, by diffusers' names without their numbers."""
    found: dict[str, list[Rule]] = {}
    for rule in documented(family):
        for module in rule.modules:
            found.setdefault(_shape(module), []).append(rule)
    return {shape: tuple(own) for shape, own in found.items()}


def _shape(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _underscored(name: str) -> str:
    return name.replace(".", "_")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)"))


def _fill(template: str, numbers: Sequence[str]) -> str:
    parts = template.split("#")
    return "".join(text for pair in zip(parts, (*numbers, ""), strict=True) for text in pair)
