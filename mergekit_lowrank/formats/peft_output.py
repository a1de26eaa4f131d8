"""Writing PEFT adapters: configurations, and adapters as they are in PEFT's layout."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.filenames import SIDE_FILE
from mergekit_lowrank.formats.base import Checkpoint, Extra, Writer
from mergekit_lowrank.formats.directory import write_text, writing
from mergekit_lowrank.formats.layouts import (
    LORA_BIAS,
    PREFIX,
    Embedding,
    Expert,
    Factored,
    Layout,
    Member,
    TokenRow,
    Whole,
)
from mergekit_lowrank.formats.peft import PeftCheckpoint
from mergekit_lowrank.formats.peft_config import CONFIG_NAME
from mergekit_lowrank.formats.stream import SafetensorsStream
from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["TENSOR_FILE", "PeftWriter", "config_text", "output_config", "slots_of", "unloadable"]

TENSOR_FILE = "adapter_model.safetensors"


def output_config(
    *,
    base_model: str | None,
    revision: str | None,
    task_type: str | None,
    layouts: Mapping[str, Layout],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    rank: int | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, object]:
    """An ``adapter_config.json``.

    By default the factors carry all scaling, and alpha equals r in every module: the one convention that every server
    reads right.

    Args:
        base_model: name or path of the model the inputs were tuned from.
        revision: its revision, where the inputs agree on one.
        task_type: PEFT's, such as ``CAUSAL_LM``.
        layouts: of every module that is stored, by its full name.
        ranks: of those with factors. Where they differ they stand in ``rank_pattern``, which most servers ignore.
        alphas: what the scaling of each is times its rank; its rank when left out.
        rank: what ``r`` is; the largest rank when left out.
        fan_in_fan_out: whether the base stores its weights as (in, out).
    """
    factored = {name: layout for name, layout in layouts.items() if isinstance(layout, Factored)}
    targets = {target: name for name, layout in factored.items() for target in layout.targets(name)}
    own_ranks = {target: ranks[name] for target, name in sorted(targets.items())}
    own_alphas = {target: (alphas or ranks)[name] for target, name in sorted(targets.items())}
    r = rank or max(own_ranks.values(), default=1)
    alpha = r if alphas is None else _most_common(own_alphas.values(), r)
    modules = sorted(name for name, layout in factored.items() if not isinstance(layout, Expert))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": _bias(layouts),
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": modules,
        "rank_pattern": _pattern(own_ranks, r),
        "alpha_pattern": _pattern(own_alphas, alpha),
        **_beside(layouts),
    }


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    # peft matches keys as (.*\.)?(KEY)$; the anchor keeps the optional group empty, so a key hits its module only.
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _most_common(values: Iterable[float], default: float) -> float:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _bias(layouts: Mapping[str, Layout]) -> str:
    """Which biases of the base are stored: none, those of modules with factors, or others too."""
    keys = [
        layout.key
        for layout in layouts.values()
        if isinstance(layout, Whole) and layout.saved_under is None and not layout.in_side_file
    ]
    biases = [key for key in keys if key.endswith(".bias") and not key.endswith(LORA_BIAS)]
    if not biases:
        return "none"
    return "lora_only" if all(".base_layer." in key for key in biases) else "all"


def _beside(layouts: Mapping[str, Layout]) -> dict[str, object]:
    """What there is beside factors, as the configuration says it."""
    whole = [layout for layout in layouts.values() if isinstance(layout, Whole)]
    saved = sorted({layout.saved_under for layout in whole if layout.saved_under})
    rows: dict[str, list[int]] = {}
    for layout in layouts.values():
        if isinstance(layout, TokenRow):
            rows.setdefault(layout.module, []).append(layout.token)
    parameters = sorted({name for own in layouts.values() if isinstance(own, Expert) for name in own.parameters})
    said: dict[str, object] = {"modules_to_save": saved or None}
    if any(layout.key.endswith(LORA_BIAS) for layout in whole):
        said["lora_bias"] = True
    if rows:
        said["trainable_token_indices"] = {module: sorted(tokens) for module, tokens in rows.items()}
    if parameters:
        said["target_parameters"] = parameters
    return said


def config_text(config: Mapping[str, object]) -> str:
    """The text of ``adapter_config.json``. Keys keep their order: in the patterns the first match wins."""
    return json.dumps(config, indent=2) + "\n"


def unloadable(layouts: Mapping[str, Layout]) -> Iterator[str]:
    """What peft (0.21) does not load together in one adapter, though each of it loads in one of its own."""
    whole = [layout for layout in layouts.values() if isinstance(layout, Whole)]
    if any(layout.key.endswith(LORA_BIAS) for layout in whole):
        for kind, what in ((Embedding, "of an embedding"), (Expert, "of fused experts")):
            other = next((name for name, layout in layouts.items() if isinstance(layout, kind)), None)
            if other is not None:
                yield f"biases of lora_B and factors {what} ('{other}')"
    saved = {layout.key.removeprefix(PREFIX).rpartition(".")[0] for layout in whole if layout.saved_under}
    for module in sorted({layout.module for layout in layouts.values() if isinstance(layout, TokenRow)}):
        if isinstance(layouts.get(module), Factored):
            yield f"trained rows and factors of one embedding ('{module}')"
        if module in saved:
            yield f"trained rows of an embedding and all of it ('{module}')"


def slots_of(members: Iterable[Member]) -> dict[str, list[Member]]:
    """The modules that share tensors, in the order of the first of each."""
    slots: dict[str, list[Member]] = {}
    for member in members:
        slots.setdefault(member.layout.slot(member.module), []).append(member)
    return slots


class PeftWriter(Writer):
    """Directories as ``PeftModel.save_pretrained`` writes them."""

    name: ClassVar[str] = "peft"
    summary: ClassVar[str] = "PEFT LoRA: adapter_config.json and adapter_model.safetensors"

    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Write configuration and tensors: factors as they are, their scaling in ``lora_alpha``."""
        if checkpoint.needs_base is not None:
            raise CheckpointError(
                f"'{checkpoint.label}': {checkpoint.needs_base}. Merge it alone with 'base_model' in the recipe."
            )
        slots = slots_of(_members(checkpoint))
        shapes = {key: shape for own in slots.values() for key, shape in own[0].layout.announced(own).items()}
        dtypes = {key: dtype for own in slots.values() for key, dtype in _dtypes(own, checkpoint).items()}
        announced = {key: (dtypes[key], shape) for key, shape in shapes.items()}
        extras = [extra for extra in checkpoint.extras.values() if not extra.in_side_file]
        announced |= {extra.key: (extra.dtype, extra.shape) for extra in extras}
        path = directory / TENSOR_FILE
        with SafetensorsStream(path, announced, metadata={"format": "pt"}) as stream:
            for own in slots.values():
                updates = [_stored(checkpoint, member) for member in own]
                for key, tensor in own[0].layout.packed(own, updates).items():
                    stream.write(key, tensor)
            for extra in extras:
                stream.write(extra.key, checkpoint.read_extra(extra.name, slice(None)).reshape(extra.shape))
        self._write_side_file(checkpoint, directory)
        write_text(directory / CONFIG_NAME, config_text(_config(checkpoint)))

    def _write_side_file(self, checkpoint: Checkpoint, directory: Path) -> None:
        side = [extra for extra in checkpoint.extras.values() if extra.in_side_file]
        if side:
            tensors = {own.key: checkpoint.read_extra(own.name, slice(None)).reshape(own.shape).clone() for own in side}
            with writing(directory / SIDE_FILE):
                torch.save(tensors, directory / SIDE_FILE)


def _members(checkpoint: Checkpoint) -> list[Member]:
    return [
        Member(name, own.layout, own.d_out, own.d_in, 0 if isinstance(own.layout, Whole) else own.rank)
        for name, own in checkpoint.modules.items()
    ]


def _dtypes(members: list[Member], checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The stored types of one slot's tensors: those of the factors, as read."""
    updates = [_stored(checkpoint, member) for member in members]
    return {key: tensor.dtype for key, tensor in members[0].layout.packed(members, updates).items()}


def _stored(checkpoint: Checkpoint, member: Member) -> LowRankUpdate | Tensor:
    """The factors without their scaling, or the matrix without it."""
    update = checkpoint.read(member.module)
    if isinstance(update, LowRankUpdate):
        return update
    return update.read(slice(None))


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    """Its own where it is PEFT's already; else one that says ranks and scaling in patterns."""
    if isinstance(checkpoint, PeftCheckpoint):
        return dict(checkpoint.config)
    factored = {name: own for name, own in checkpoint.modules.items() if isinstance(own.layout, Factored)}
    ranks = {name: own.rank for name, own in factored.items()}
    layouts = {name: own.layout for name, own in checkpoint.modules.items()}
    layouts |= {name: layout for extra in checkpoint.extras.values() for name, layout in _layouts_of(extra)}
    return output_config(
        base_model=checkpoint.base_model,
        revision=checkpoint.revision,
        task_type=checkpoint.task_type,
        layouts=layouts,
        ranks=ranks,
        alphas={name: own.scaling * own.rank for name, own in factored.items()},
        rank=int(_most_common(ranks.values(), 1)),
        fan_in_fan_out=checkpoint.fan_in_fan_out,
    )


def _layouts_of(extra: Extra) -> Iterator[tuple[str, Layout]]:
    """A tensor beside factors as modules are stored: one, or one for each row."""
    module = extra.name.removesuffix(".weight")
    if extra.tokens is None:
        yield extra.name, Whole(extra.key, extra.shape, None, extra.saved_under, extra.in_side_file)
    for token in extra.tokens or ():
        yield f"{module}[{token}]", TokenRow(extra.key, module, token)
