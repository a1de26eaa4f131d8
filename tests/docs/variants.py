"""One example of each kind of checkpoint, and what becomes of it: the rows of docs/reference/formats.md.

Nothing is declared but names and notes. Each example is made, by peft where peft can make it, merged alone at weight 1,
loaded back and compared; given to every writer; and, where peft merges it, merged by ``add_weighted_adapter``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from mergekit_lowrank import MergeError, Registry, convert, merge
from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.peft_output import TENSOR_FILE
from mergekit_lowrank.formats.variants import UNSUPPORTED
from mergekit_lowrank.testing import write_tiny_adapter
from tests.end_to_end.lora_variants import LINEAR, VARIANTS, llama, logits, trained

TOLERANCE = 1e-3
"""Of logits, relative. What peft gets wrong it gets wrong by tenths."""
COMBINATIONS = ("linear", "cat", "svd")
NEEDS: tuple[dict[str, str], ...] = ({}, {"extras": "average"}, {"base_model": "base"})
RANK = {"rank": {"error": 1e-6}}
"""High enough for dense updates."""
NOTHING = "-"

TITLES: Mapping[str, tuple[str, str]] = {
    "linear": ("LoRA of linear layers", ""),
    "rslora": ("rsLoRA", "scaling α/√r"),
    "patterns": ("`rank_pattern`, `alpha_pattern`", "matched as peft matches them"),
    "layers": ("`layers_to_transform`", ""),
    "all_linear": ("`target_modules: all-linear`", ""),
    "fan_in_fan_out": ("`fan_in_fan_out`", "weights stored as (in, out), as in GPT-2"),
    "embedding": ("LoRA of an embedding", "`lora_embedding_A`, `lora_embedding_B`; peft stores the table with it"),
    "convolutions": ("LoRA of Conv1d, Conv2d, Conv3d", "merged as matrices (out, in · k)"),
    "lora_bias": ("`lora_bias`", "merged entry by entry"),
    "bias_all": ("`bias: all`", ""),
    "bias_lora_only": ("`bias: lora_only`", ""),
    "modules_to_save": ("`modules_to_save`", ""),
    "tied_modules_to_save": ("`modules_to_save` of a tied embedding", "stays tied"),
    "token_rows": ("`trainable_token_indices`", ""),
    "tied_token_rows": ("`trainable_token_indices`, tied", ""),
    "experts": ("`target_parameters`", "fused experts: each is a module of its own"),
    "experts_in_out": ("`target_parameters`, (in, out)", "the same, stored the other way round"),
    "dora": ("DoRA", "a dense update, exact through its base; as an adapter cut to `output.rank`"),
    "dora_embedding": ("DoRA of an embedding", "the same"),
    "dora_fan_in_fan_out": ("DoRA with `fan_in_fan_out`", "the same"),
}
"""Title and note by the name of a variant of a LoRA."""


@dataclass(frozen=True)
class Example:
    """One kind of checkpoint.

    Attributes:
        title: as the table calls it.
        note: what there is to know.
        model: its base; None where no logits are compared.
        make: writes it to a path.
    """

    title: str
    note: str
    model: Callable[[], nn.Module] | None
    make: Callable[[Path], object]


def examples(registry: Registry) -> Iterator[Example]:
    """All of them."""
    for name, variant in VARIANTS.items():
        title, note = TITLES.get(name, (name.replace("_", " "), ""))
        yield Example(title, note, variant.model, lambda path, own=variant: trained(own, path, seed=1))
    for title, note, config in OTHER_KINDS:
        yield Example(title, note, llama, lambda path, own=config: _random(own(), path))
    yield Example("LLaVA", "`non_lora_trainables.bin` beside the adapter", None, _llava)
    for name in ("pissa", "olora", "corda", "loftq", "lora_ga"):
        yield Example(
            f"`init_lora_weights: {name}`", CHANGES_BASE, None, lambda path, own=name: _initialised(own, path)
        )
    yield Example("full fine-tune", "norms and other vectors are `extras` of an adapter", None, _fine_tune)
    yield Example("LoRA of a diffusion model", "linear layers and a convolution, in PEFT's layout", None, _diffusion)
    for name in ("diffusers", "kohya"):
        yield Example(f"{name} LoRA", "", None, lambda path, own=name: _in_dialect(own, path, registry))
    for title, tensors in LYCORIS.items():
        yield Example(title, "", None, lambda path, own=tensors: _kohya(own, path))


CHANGES_BASE = "the base that it fits is not the original; save it as a plain LoRA"
OTHER_KINDS: tuple[tuple[str, str, Callable[[], Any]], ...] = (
    ("AdaLoRA", "rank left by the masks", lambda: AdaLoraConfig(total_step=10, target_modules=LINEAR)),
    ("LoHa", "", lambda: LoHaConfig(r=2, alpha=3, target_modules=LINEAR)),
    ("LoKr", "", lambda: LoKrConfig(r=2, alpha=3, target_modules=LINEAR)),
    ("VeRA", "", lambda: VeraConfig(r=4, target_modules=["q_proj"])),
)


COLUMNS = ("checkpoint", "merged", "result in peft", "written as", "peft's `add_weighted_adapter`", "note")

UNET = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (6, 4), "unet.conv_in": (6, 4)}
"""Modules of a Stable Diffusion UNet."""
LYCORIS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "LyCORIS LoCon with `lora_mid`": {
        "lora_down.weight": (2, 4, 1, 1),
        "lora_mid.weight": (2, 2, 3, 3),
        "lora_up.weight": (6, 2, 1, 1),
    },
    "LyCORIS LoHa": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
    "LyCORIS LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
    "LyCORIS with `dora_scale`": {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "dora_scale": (6, 1)},
}
"""Tensors of one module, by their names in a kohya file."""


def table_rows(registry: Registry) -> list[tuple[str, ...]]:
    """A text for each of ``COLUMNS``, for each example, and one row for what is refused by name."""
    disable_progress_bar()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")  # of peft and transformers; an error would read as a refusal
        return [*_rows(registry, Path(directory))]


def _rows(registry: Registry, directory: Path) -> Iterator[tuple[str, ...]]:
    for number, example in enumerate(examples(registry)):
        place = directory / str(number)
        place.mkdir()
        torch.manual_seed(0)
        example.make(place / "adapter")
        if example.model is not None:
            _save_base(example.model(), place / "base")
        needs, result = _merged(example, place, registry)
        out = ", ".join(f"`{name}`" for name in sorted(registry.writers) if _is_written(name, place, registry))
        own = _peft(example, place) if example.model is not None else NOTHING
        yield example.title, needs, result, out or NOTHING, own, example.note
        shutil.rmtree(place)
    names = ", ".join(name for name in sorted(UNSUPPORTED) if _is_refused(name, directory, registry))
    yield "PEFT's other kinds", "refused", NOTHING, NOTHING, NOTHING, f"{names}: the message says why, and what to do"


def _merged(example: Example, place: Path, registry: Registry) -> tuple[str, str]:
    """What a merge of the example alone needs, and whether peft computes the same with its result."""
    for needs in ({**one, **other} for one, other in product(NEEDS, NEEDS[:2])):
        recipe = {"merge_method": "linear", "models": [{"model": str(place / "adapter")}], "output": RANK, **needs}
        if "base_model" in needs:
            recipe["base_model"] = str(place / "base")
        try:
            merge(recipe, place / "merged", registry=registry)
        except MergeError:
            continue
        keys = " and ".join(f"`{key}`" for key in sorted(needs))
        return f"needs {keys}" if needs else "yes", _result(example, place)
    return "refused", NOTHING


def _result(example: Example, place: Path) -> str:
    if example.model is None:
        return NOTHING
    wanted, found = (logits(PeftModel.from_pretrained(example.model(), place / name)) for name in ("adapter", "merged"))
    return "same logits" if _are_close(found, wanted) else "other logits"


def _is_written(writer: str, place: Path, registry: Registry) -> bool:
    base = place / "base" if writer == "gguf" and (place / "base").exists() else None
    try:
        convert(place / "adapter", place / writer, format=writer, base=base, registry=registry)
    except MergeError:
        return False
    return True


def _peft(example: Example, place: Path) -> str:
    """What ``add_weighted_adapter`` makes of the adapter alone, at weight 1."""
    found: dict[str, list[str]] = {}
    for combination in COMBINATIONS:
        assert example.model is not None
        model = PeftModel.from_pretrained(example.model(), place / "adapter")
        found.setdefault(_judged(model, combination), []).append(combination)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in found.items())


def _judged(model: PeftModel, combination: str) -> str:
    if not hasattr(model.base_model, "add_weighted_adapter"):
        return "has none"
    wanted = logits(model)
    try:
        model.add_weighted_adapter(["default"], [1.0], "merged", combination_type=combination)
        model.set_adapter("merged")
        return "right" if _are_close(logits(model), wanted) else "**wrong**"
    except Exception:
        return "raises"


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= TOLERANCE * float(wanted.norm())


def _save_base(model: nn.Module, path: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path)
        return
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "tiny"}')
    save_file(dict(model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})


def _random(config: Any, path: Path) -> None:
    """An adapter of another kind, no parameter of it zero."""
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for parameter in (own for own in model.parameters() if own.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)


def _llava(path: Path) -> None:
    trained(VARIANTS["linear"], path, seed=1)
    torch.save({"base_model.model.model.mm_projector.weight": torch.randn(4, 3)}, path / "non_lora_trainables.bin")


def _initialised(name: str, path: Path) -> None:
    trained(VARIANTS["linear"], path, seed=1)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": name}))


def _fine_tune(path: Path) -> None:
    base = llama()
    base.save_pretrained(path.with_name("base"))
    for parameter in base.parameters():
        parameter.data.add_(0.01 * torch.randn(parameter.shape))
    base.save_pretrained(path)


def _diffusion(path: Path) -> None:
    write_tiny_adapter(path, UNET)
    key = "base_model.model.unet.conv_in.lora_{}.weight".format
    factors = {key("A"): torch.randn(2, 4, 3, 3), key("B"): torch.randn(6, 2, 1, 1)}
    save_file({**load_file(path / TENSOR_FILE), **factors}, path / TENSOR_FILE)


def _in_dialect(name: str, path: Path, registry: Registry) -> None:
    _diffusion(path.with_name("source"))
    convert(path.with_name("source"), path, format=name, registry=registry)


def _kohya(tensors: Mapping[str, tuple[int, ...]], path: Path) -> None:
    path.mkdir()
    place = (
        "lora_unet_conv_in" if "lora_mid.weight" in tensors else "lora_unet_" + next(iter(UNET))[5:].replace(".", "_")
    )
    made = {f"{place}.{name}": torch.randn(shape) for name, shape in tensors.items()}
    save_file({**made, f"{place}.alpha": torch.tensor(2.0)}, path / "lora.safetensors")


def _is_refused(kind: str, directory: Path, registry: Registry) -> bool:
    path = directory / kind
    trained_config = {"peft_type": kind, "base_model_name_or_path": "base"}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(trained_config))
    save_file({"x": torch.ones(1)}, path / "adapter_model.safetensors")
    try:
        open_checkpoint(path, registry, label=kind)
    except CheckpointError as error:
        return kind in str(error)
    return False
