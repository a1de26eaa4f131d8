"""Readers: a file of kohya's tools, LyCORIS or diffusers, whichever its keys show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from mergekit_lowrank import Checkpoint, CheckpointError, Format
from mergekit_lowrank.formats import CONFIG_NAME, Findings, PeftConfig, SafetensorsHeader, TensorSource, open_tensors
from mergekit_lowrank_diffusion.checkpoint import Assembly, DiffusionCheckpoint
from mergekit_lowrank_diffusion.forms import FORMS
from mergekit_lowrank_diffusion.names import COMPONENTS, KOHYA_PREFIXES, Rule, family_of, kohya_rule
from mergekit_lowrank_diffusion.origin import Origin

__all__ = ["DIFFUSERS_FILE", "DIFFUSERS_KEY", "DiffusersFormat", "KohyaFormat", "kept"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""``LORA_WEIGHT_NAME_SAFE`` of diffusers 0.42 ``loaders/lora_base.py``."""
DIFFUSERS_KEY = "lora_adapter_metadata"
"""The header key under which diffusers (since 0.34) keeps the configurations of PEFT."""

_OTHERS = ("adapter_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors")
_OTHER_DIRECTORIES = (CONFIG_NAME, "config.json", "model_index.json")
_FACTOR_NAMES = frozenset(name for form in FORMS for names in form.tensors for name in names)
_KEPT = ("ss_", "sshs_", "modelspec.")


def kept(config: Mapping[str, object]) -> dict[str, str]:
    """What kohya's tools say in a header of how a LoRA was trained, and of what it is."""
    return {name: value for name, value in config.items() if name.startswith(_KEPT) and isinstance(value, str)}


class KohyaFormat(Format):
    """Files of kohya's sd-scripts, LyCORIS and the tools that follow them."""

    name: ClassVar[str] = "kohya"
    summary: ClassVar[str] = "kohya and LyCORIS: one .safetensors file with lora_unet_… and lora_te…, or its directory"

    def recognises(self, path: Path) -> bool:
        """Whether it is a .safetensors file with a name of its own, or a directory with just one."""
        return _own_file(path) is not None

    def open(self, path: Path, *, label: str) -> Checkpoint:
        """The LoRA in ``path``."""
        return _opened(_own_file(path), path, label)


class DiffusersFormat(Format):
    """Files that ``save_lora_weights`` of a diffusers pipeline writes."""

    name: ClassVar[str] = "diffusers"
    summary: ClassVar[str] = f"diffusers: {DIFFUSERS_FILE}, or its directory"

    def recognises(self, path: Path) -> bool:
        """Whether it is the file of that name, or a directory that holds it."""
        return _diffusers_file(path).is_file()

    def open(self, path: Path, *, label: str) -> Checkpoint:
        """The LoRA in ``path``."""
        return _opened(_diffusers_file(path), path, label)


def _own_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".safetensors" and path.name not in (*_OTHERS, DIFFUSERS_FILE) else None
    if not path.is_dir() or any((path / name).exists() for name in _OTHER_DIRECTORIES):
        return None
    files = sorted(path.glob("*.safetensors"))
    return _own_file(files[0]) if len(files) == 1 else None


def _diffusers_file(path: Path) -> Path:
    return path if path.name == DIFFUSERS_FILE and not path.is_dir() else path / DIFFUSERS_FILE


def _opened(file: Path | None, path: Path, label: str) -> Checkpoint:
    where = f"adapter '{label}'"
    if file is None or not file.is_file():
        raise CheckpointError(f"{where}: {path} does not hold one .safetensors file with a LoRA. Give the file's path.")
    source = open_tensors(file)
    metadata = SafetensorsHeader.read(file).metadata
    origin, findings = Origin.of(metadata, where=where), Findings(where)
    assembly = Assembly(source, origin, findings)
    is_kohya = any(key.startswith(KOHYA_PREFIXES) for key in source.specs)
    gather = _gather_kohya if is_kohya else _gather_diffusers
    config = gather(source, metadata, origin, assembly, findings)
    findings.raise_all()
    if not assembly.stored:
        raise CheckpointError(
            f"{where}: the adapter is empty; expected keys such as 'lora_unet_….lora_down.weight' or "
            "'unet.….lora_A.weight'."
        )
    return DiffusionCheckpoint(
        source,
        assembly.stored,
        label=label,
        location=str(path),
        config=config,
        base_model=origin.base_model or _base_model(config),
        revision=origin.revision,
    )


def _gather_kohya(
    source: TensorSource, metadata: Mapping[str, str], origin: Origin, assembly: Assembly, findings: Findings
) -> dict[str, object]:
    """Take in a file of kohya's; what its header says."""
    names: dict[str, dict[str, str]] = {}
    for key in source.specs:
        name, _, leaf = key.partition(".")
        if name.startswith(KOHYA_PREFIXES) and (leaf in _FACTOR_NAMES or leaf == "alpha"):
            names.setdefault(name, {})[leaf] = key
        else:
            _judge(key, findings)
    family = family_of(names)
    for name, keys in names.items():
        alpha = keys.pop("alpha", None)
        rule = kohya_rule(name, family) or Rule(name, (name,))
        if origin.modules.get(name):
            modules = tuple(origin.modules[name])
            shares = rule.shares if len(rule.shares) == len(modules) else (1,) * len(modules)
            rule = Rule(name, modules, shares)
        assembly.add(rule, keys, _scaling(source, alpha, keys, findings))
    return dict(kept(metadata))


def _gather_diffusers(
    source: TensorSource, metadata: Mapping[str, str], origin: Origin, assembly: Assembly, findings: Findings
) -> dict[str, object]:
    """Take in a file of diffusers'; the configurations in its header."""
    names: dict[str, dict[str, str]] = {}
    for key in source.specs:
        module, leaf = _diffusers_key(key)
        if module.partition(".")[0] in COMPONENTS and leaf:
            names.setdefault(module, {})[leaf] = key
        else:
            _judge(key, findings)
    config = _diffusers_config(metadata, findings)
    scaling_of = _configured(config, findings)
    for name, keys in names.items():
        alpha = keys.pop("alpha", None)
        own = _scaling(source, alpha, keys, findings)
        shape = source.specs[keys["lora_down.weight"]].shape if "lora_down.weight" in keys else ()
        if alpha is None and shape and shape[0]:
            own = scaling_of(name, shape[0])
        modules = tuple(origin.modules.get(name) or (name,))
        assembly.add(Rule(name, modules), keys, own)
    return {**config, **kept(metadata)}


_DIFFUSERS_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<side>down|up)\.weight"), ""),
    (re.compile(r"(?P<module>.+?)(\.processor)?\.to_(?P<leaf>q|k|v|out)_lora\.(?P<side>down|up)\.weight"), "to_"),
)
"""diffusers 0.42 ``utils/state_dict_utils.py``: PEFT's names, those before 0.22, and those of attention processors."""


def _diffusers_key(key: str) -> tuple[str, str]:
    """(module, what the tensor is to a form) of a key; the latter empty for a key that is no factor's."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    for pattern, before in _DIFFUSERS_KEYS:
        match = pattern.fullmatch(key)
        if match:
            side = "lora_down.weight" if match["side"] in ("A", "down") else "lora_up.weight"
            leaf = f".{_leaf(match['module'], match['leaf'])}" if before else ""
            return match["module"] + leaf, side
    return key, ""


def _leaf(module: str, leaf: str) -> str:
    """The linear layer of an attention: of CLIP, or of a UNet."""
    if module.startswith("text_encoder"):
        return f"{leaf}_proj"
    return "to_out.0" if leaf == "out" else f"to_{leaf}"


def _diffusers_config(metadata: Mapping[str, str], findings: Findings) -> dict[str, object]:
    """The configurations of all components, as diffusers stores them."""
    try:
        config = json.loads(metadata.get(DIFFUSERS_KEY, "{}"))
    except (ValueError, RecursionError):
        config = None
    advice = f"Expected JSON with keys such as 'unet.r' and 'text_encoder.lora_alpha' under '{DIFFUSERS_KEY}'."
    if not isinstance(config, dict):
        findings.add("a header that cannot be read", f"'{DIFFUSERS_KEY}'", advice)
        return {}
    for name in config:
        if name.partition(".")[0] not in COMPONENTS:
            findings.add("fields of the header that belong to no component", f"'{name}'", advice)
    return config


def _configured(config: Mapping[str, object], findings: Findings) -> Callable[[str, int], float]:
    """The scaling of a module by its name and rank, as the configuration of its component has it; 1 without one."""
    own: dict[str, PeftConfig] = {}
    for component in COMPONENTS:
        fields = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
        if fields:
            try:
                where = f"header key '{DIFFUSERS_KEY}', '{component}'"
                own[component] = PeftConfig.parse({"peft_type": "LORA"} | fields, where=where)
                _refuse_dora(own[component], where)
            except CheckpointError as error:
                findings.add("a configuration that is refused", str(error).rstrip("."), "Correct the file's header.")

    def scaling(name: str, rank: int) -> float:
        component, _, module = name.partition(".")
        if component not in own:
            return 1.0
        if own[component].rank_of(module) != rank:
            findings.add(
                f"the configuration in '{DIFFUSERS_KEY}' contradicts the ranks of the tensors",
                f"module '{name}' (configuration {own[component].rank_of(module)}, tensors {rank})",
                "Its scaling would be wrong: correct 'r' or 'rank_pattern', or save the adapter again.",
            )
        return own[component].scaling_of(module, rank=rank)

    return scaling


def _refuse_dora(config: PeftConfig, where: str) -> None:
    if config.use_dora:
        raise CheckpointError(
            f"{where}: 'use_dora' is set. DoRA acts only together with the base model: fold the LoRA into it and "
            "extract a plain LoRA from the difference"
        )


def _scaling(source: TensorSource, alpha: str | None, keys: Mapping[str, str], findings: Findings) -> float:
    """The alpha over the rank, 1 without an alpha; not applied to a LoKr of two full matrices, as LyCORIS has it."""
    if alpha is None:
        return 1.0
    rank_keys = (name for form in FORMS if frozenset(keys) in form.tensors for name in form.rank_tensors)
    rank_key = next((keys[name] for name in rank_keys if name in keys), None)
    found = source.read(alpha) if math.prod(source.specs[alpha].shape) == 1 else None
    value = float(found) if found is not None else math.nan
    if not math.isfinite(value) or value == 0:
        findings.add(
            "alphas that are no number other than 0",
            f"'{alpha}' ({list(source.specs[alpha].shape)}, {value})",
            "sd-scripts reads 0 as the rank, ComfyUI as 0: write the alpha that is meant.",
        )
        return 1.0
    rank = next(iter(source.specs[rank_key].shape), 0) if rank_key else 0
    return value / rank if rank else 1.0


_FOREIGN: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"dora_scale$|lora_magnitude_vector"),
        "DoRA magnitudes (dora_scale), which act only together with the base model",
        "Fold the LoRA into its base model and extract a plain LoRA from the difference.",
    ),
    (
        re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight|bias|lora_up\.bias|lora_B\.bias)$"),
        "whole weights, biases and norms, which a merge of factors would drop",
        "Train without them (LyCORIS: algo other than 'full', train_norm=False).",
    ),
    (
        re.compile(r"\.(oft_\w+|on_input|a[12]\.weight|b[12]\.weight|scalar|rank_dropout\w*|boft\w*|ia3\w*)$"),
        "tensors of LyCORIS methods other than LoCon, LoHa and LoKr",
        "Train or export it as one of these.",
    ),
    (
        re.compile(r"^(?!lora_|unet\.|transformer\.|text_encoder).*\.lora_(A|B|down|up)\b"),
        "keys without a component",
        "Expected a prefix such as 'unet.', 'transformer.', 'text_encoder.', 'lora_unet_' or 'lora_te1_'.",
    ),
)


def _judge(key: str, findings: Findings) -> None:
    """Say of what kind a key is that is no factor's."""
    unknown = (
        "tensors that nothing here handles",
        "Expected keys such as 'lora_unet_….lora_down.weight', '….alpha' or 'unet.….lora_A.weight'.",
    )
    kinds: Iterator[tuple[str, str]] = ((what, advice) for pattern, what, advice in _FOREIGN if pattern.search(key))
    what, advice = next(kinds, unknown)
    findings.add(what, f"'{key}'", advice)


def _base_model(config: Mapping[str, object]) -> str | None:
    """The base as the header names it: diffusers by a path or repository, kohya's tools by an architecture."""
    names = [f"{component}.base_model_name_or_path" for component in COMPONENTS]
    names += ["ss_base_model_version", "modelspec.architecture"]
    found = (config[name] for name in names if isinstance(config.get(name), str))
    return next((str(name).removesuffix("/lora") for name in found if name), None)
