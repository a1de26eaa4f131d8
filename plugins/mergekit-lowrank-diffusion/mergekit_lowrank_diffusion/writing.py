"""Writers: an adapter as kohya's tools and diffusers store it, without a rounding."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_lowrank import Checkpoint, CheckpointError, LowRankUpdate
from mergekit_lowrank.formats import Convolution, Factored, Findings, Linear, SafetensorsStream, Writer, output_config
from mergekit_lowrank_diffusion.header import KOHYA_FILE, in_order, kohya_metadata, sign
from mergekit_lowrank_diffusion.names import (
    COMPONENTS,
    KOHYA_PREFIXES,
    Family,
    Rule,
    component_of,
    family_of,
    module_rule,
)
from mergekit_lowrank_diffusion.origin import Origin
from mergekit_lowrank_diffusion.reading import DIFFUSERS_FILE, DIFFUSERS_KEY, kept

__all__ = ["DiffusersWriter", "KohyaWriter"]


@dataclass(frozen=True)
class Slot:
    """What is written under one name.

    Attributes:
        rule: the name, and diffusers' names of the modules in it.
        modules: those that the adapter has, as it calls them, by diffusers' names.
    """

    rule: Rule
    modules: Mapping[str, str]


@dataclass(frozen=True)
class Packed:
    """The update of one slot.

    Attributes:
        tensors: by the names as they end in a kohya file.
        rank: of the update.
        alpha: what its scaling is times its rank.
        ranks: of each part, where the parts stand in blocks.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    ranks: list[int] | None = None


class KohyaWriter(Writer):
    """One file as sd-scripts writes it, for ComfyUI, A1111, Forge and kohya's own tools."""

    name: ClassVar[str] = "kohya"
    summary: ClassVar[str] = f"kohya: {KOHYA_FILE} with lora_unet_…, lora_te…, alphas and header"

    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Write the file; layers that the base fuses are written fused.

        Where the parts of a fused layer share A, bit for bit, B is stacked. Else they stand in blocks, as sd-scripts
        writes ``split_qkv``: A stacked, B block-diagonal, the rank the sum of theirs. That is exact as well.
        """
        slots, family = _kohya_slots(checkpoint)
        outlines = {slot.rule.stored: _without_data(_packed(checkpoint, slot)) for slot in slots}
        announced = {
            f"{name}.{leaf}": (tensor.dtype, tuple(tensor.shape))
            for name, outline in outlines.items()
            for leaf, tensor in outline.tensors.items()
        }
        origin = _origin(checkpoint, slots, {name: outline.ranks for name, outline in outlines.items()})
        sizes = {(outline.rank, outline.alpha) for outline in outlines.values()}
        metadata = kohya_metadata(checkpoint, family, sizes) | {Origin.key: origin.text()}
        path = directory / KOHYA_FILE
        with SafetensorsStream(path, in_order(announced), metadata=metadata) as stream:
            for slot in slots:
                for leaf, tensor in _packed(checkpoint, slot).tensors.items():
                    stream.write(f"{slot.rule.stored}.{leaf}", tensor)
        sign(path, metadata)


class DiffusersWriter(Writer):
    """The file that a diffusers pipeline loads with ``load_lora_weights``."""

    name: ClassVar[str] = "diffusers"
    summary: ClassVar[str] = f"diffusers: {DIFFUSERS_FILE}, with the configurations in its header"

    def write(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Write the file: PEFT's factors under diffusers' names, ranks and alphas of each component in the header."""
        findings = Findings(f"'{checkpoint.label}'")
        names = _diffusers_names(checkpoint, findings)
        for opaque in (name for name in names if name.startswith(KOHYA_PREFIXES)):
            findings.add(
                "names of kohya's that have no documented one in diffusers", f"'{opaque}'", "Write it as 'kohya'."
            )
        findings.raise_all()
        slots = [Slot(Rule(name, (name,)), {name: module}) for name, module in names.items()]
        announced = {
            key: (tensor.dtype, tuple(tensor.shape))
            for slot in slots
            for key, tensor in _diffusers_tensors(checkpoint, slot).items()
        }
        metadata = kept(checkpoint.config) | {
            "format": "pt",
            DIFFUSERS_KEY: json.dumps(_diffusers_config(checkpoint, names), indent=2, sort_keys=True),
            Origin.key: _origin(checkpoint, slots, {}).text(),
        }
        with SafetensorsStream(directory / DIFFUSERS_FILE, announced, metadata=metadata) as stream:
            for slot in slots:
                for key, tensor in _diffusers_tensors(checkpoint, slot).items():
                    stream.write(key, tensor)


def _diffusers_names(checkpoint: Checkpoint, findings: Findings) -> dict[str, str]:
    """What each module is called in a pipeline, or in a kohya file where its name is no other's, and in the adapter."""
    names: dict[str, str] = {}
    for module in _holdable(checkpoint, findings):
        if module.startswith(KOHYA_PREFIXES) and "." not in module:
            names[module] = module
            continue
        component = component_of(module) if checkpoint.task_type is None else None
        if component is None:
            findings.add(
                "modules that belong to no UNet, transformer or text encoder of a diffusion model, as those of a "
                "language model",
                f"'{module}'",
                f"Expected names such as '{COMPONENTS[0]}.down_blocks.0.…'; of text encoders, with 'text_encoder.' "
                "before them. Write the adapter as 'peft'.",
            )
            continue
        names[module if module.partition(".")[0] == component else f"{component}.{module}"] = module
    return names


def _holdable(checkpoint: Checkpoint, findings: Findings) -> Iterator[str]:
    """The modules; what neither dialect can hold becomes findings."""
    if checkpoint.needs_base is not None:
        findings.add("an adapter that needs its base", checkpoint.needs_base, "Merge it with 'base_model' first.")
    for extra in checkpoint.extras.values():
        findings.add(
            "tensors beside the low-rank factors, for which the format has no place",
            f"'{extra.key}'",
            "Write the adapter as 'peft'.",
        )
    for module, header in checkpoint.modules.items():
        if header.is_dense or not isinstance(header.layout, Linear | Convolution):
            findings.add(
                "updates of other than linear layers and convolutions, for which the format has no place",
                f"'{module}'",
                "Write the adapter as 'peft'.",
            )
        elif not math.isfinite(header.scaling) or header.scaling == 0:
            findings.add(
                "modules whose scaling is 0 or not finite", f"'{module}'", "Tools read an alpha of 0 in several ways."
            )
        else:
            yield module


def _kohya_slots(checkpoint: Checkpoint) -> tuple[list[Slot], Family]:
    """The names to write, in the order of the modules, and the family that gives them.

    Raises:
        CheckpointError: what kohya's files have no place for, all in one.
    """
    findings = Findings(f"'{checkpoint.label}'")
    names = _diffusers_names(checkpoint, findings)
    keys = (own.d_in for name, own in checkpoint.modules.items() if name.endswith((".attn2.to_k", ".attn2.to_v")))
    family = family_of(names, keys) or Family.SD
    slots: dict[str, Slot] = {}
    for name, module in names.items():
        rule = Rule(name, (name,)) if name.startswith(KOHYA_PREFIXES) else module_rule(name, family)
        if rule is None:
            findings.add(
                f"modules without a documented name in kohya's files of {family.value}",
                f"'{name}'",
                "Write the adapter as 'diffusers'.",
            )
            continue
        known = slots.get(rule.stored, Slot(rule, {}))
        slots[rule.stored] = Slot(rule, {**known.modules, name: module})
    for slot in slots.values():
        _check_fused(checkpoint, slot, findings)
    findings.raise_all()
    return list(slots.values()), family


def _check_fused(checkpoint: Checkpoint, slot: Slot, findings: Findings) -> None:
    """Note parts of a fused layer that do not make up one."""
    parts = [checkpoint.modules[module] for module in slot.modules.values()]
    shares = dict(zip(slot.rule.modules, slot.rule.shares, strict=True))
    units = {checkpoint.modules[module].d_out / shares[name] for name, module in slot.modules.items()}
    kinds = {(part.scaling, part.d_in, part.layout) for part in parts}
    if len(slot.rule.modules) > 1 and (len(kinds) > 1 or len(units) > 1):
        findings.add(
            "layers that kohya's files fuse, whose parts differ in scaling or size",
            f"'{slot.rule.stored}' ({', '.join(slot.modules.values())})",
            "One alpha holds for all of them: write the adapter as 'diffusers', or merge it alone first, which "
            "multiplies the scaling into the factors.",
        )


def _packed(checkpoint: Checkpoint, slot: Slot) -> Packed:
    """The tensors of one slot."""
    updates = {name: _read(checkpoint, module) for name, module in slot.modules.items()}
    if len(slot.rule.modules) == 1:
        (module,), (update,) = slot.modules.values(), updates.values()
        layout = checkpoint.modules[module].layout
        assert isinstance(layout, Factored)  # noqa: S101 - _holdable refuses others
        down, up = layout.stored(update)
        return _pack(down, up, update.scaling)
    scaling = next(iter(updates.values())).scaling
    parts = [updates.get(name) for name in slot.rule.modules]
    whole = [part for part in parts if part is not None]
    if len(whole) == len(parts) and all(_same(part.a, whole[0].a) for part in whole):
        return _pack(whole[0].a, torch.cat([part.b for part in whole]), scaling)
    unit = next(part.b.shape[0] // share for part, share in zip(parts, slot.rule.shares, strict=True) if part)
    empty = [whole[0].b.new_zeros(share * unit, 0) for share in slot.rule.shares]
    blocks = [lack if part is None else part.b for part, lack in zip(parts, empty, strict=True)]
    ranks = [0 if part is None else part.rank for part in parts]
    return _pack(torch.cat([part.a for part in whole]), _block_diagonal(blocks), scaling, ranks)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    dtype = next(block.dtype for block in blocks if block.shape[1])
    found = torch.zeros(sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks), dtype=dtype)
    row = column = 0
    for block in blocks:
        found[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return found


def _pack(down: Tensor, up: Tensor, scaling: float, ranks: list[int] | None = None) -> Packed:
    rank = down.shape[0]
    alpha = alpha_of(scaling, rank)
    single = torch.tensor(alpha, dtype=torch.float32)
    stored = single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)
    tensors = {"alpha": stored, "lora_down.weight": down.contiguous(), "lora_up.weight": up.contiguous()}
    return Packed(tensors, rank, alpha, ranks)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _without_data(packed: Packed) -> Packed:
    outlines = {leaf: torch.empty_like(tensor, device="meta") for leaf, tensor in packed.tensors.items()}
    return Packed(outlines, packed.rank, packed.alpha, packed.ranks)


def _read(checkpoint: Checkpoint, module: str) -> LowRankUpdate:
    update = checkpoint.read(module)
    if not isinstance(update, LowRankUpdate):
        raise CheckpointError(f"'{checkpoint.label}': module '{module}' has no factors. Extract an adapter first.")
    return update


def alpha_of(scaling: float, rank: int) -> float:
    """The alpha whose quotient by the rank is the scaling: exactly, where there is one in float64."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scaling), alpha)


def _diffusers_tensors(checkpoint: Checkpoint, slot: Slot) -> dict[str, Tensor]:
    packed = _packed(checkpoint, slot).tensors
    name = slot.rule.stored
    return {f"{name}.lora_A.weight": packed["lora_down.weight"], f"{name}.lora_B.weight": packed["lora_up.weight"]}


def _diffusers_config(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, object]:
    """A configuration of PEFT for each component, its fields behind the component's name."""
    found: dict[str, object] = {}
    for component in COMPONENTS:
        own = {
            name.removeprefix(f"{component}."): checkpoint.modules[module]
            for name, module in names.items()
            if name.startswith(f"{component}.")
        }
        if not own:
            continue
        ranks = {name: header.rank for name, header in own.items()}
        config = output_config(
            base_model=checkpoint.base_model,
            revision=checkpoint.revision,
            task_type=None,
            layouts={name: header.layout for name, header in own.items()},
            ranks=ranks,
            alphas={name: alpha_of(header.scaling, header.rank) for name, header in own.items()},
            rank=Counter(ranks.values()).most_common(1)[0][0],
        )
        found |= {f"{component}.{field}": value for field, value in config.items()}
    return found


def _origin(checkpoint: Checkpoint, slots: Sequence[Slot], ranks: Mapping[str, list[int] | None]) -> Origin:
    """What the file says beside its dialect, so that it can be turned back."""
    return Origin(
        modules={slot.rule.stored: [slot.modules.get(name, name) for name in slot.rule.modules] for slot in slots},
        ranks={name: own for name, own in ranks.items() if own is not None},
        scalings={
            name: own.scaling
            for name, own in checkpoint.modules.items()
            if alpha_of(own.scaling, own.rank) / own.rank != own.scaling
        },
        base_model=checkpoint.base_model,
        revision=checkpoint.revision,
    )
