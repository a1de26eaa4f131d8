"""What the tensors of an adapter of PEFT's other kinds are: modules by form, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_lowrank.formats.base import Extra
from mergekit_lowrank.formats.layouts import PREFIX
from mergekit_lowrank.formats.peft_config import CONFIG_NAME
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.formats.tensors import TensorSpec
from mergekit_lowrank.formats.variants.config import VariantConfig
from mergekit_lowrank.formats.variants.forms import Fit, Form

__all__ = ["Stored", "Vocabulary", "extras_of", "modules_of"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE = re.compile(rf"{re.escape(PREFIX)}(?!.*(lora_|hada_|lokr_|vera_|original_module|trainable_tokens)).+\.[^.]+")
_SAVE = "Save the adapter with PeftModel.save_pretrained"


@dataclass(frozen=True)
class Vocabulary:
    """How a kind names its tensors.

    Attributes:
        forms: the sets of tensors in which it stores a module.
        shared: the names in the file of those that all modules share, by part.
    """

    forms: Sequence[Form]
    shared: Mapping[str, str]

    @property
    def example(self) -> str:
        """A name as it is expected."""
        return f"{PREFIX}<module>.{next(iter(self.forms[0].dims))}"

    def module_and_part(self, key: str) -> tuple[str, str] | None:
        """What a tensor belongs to; None where it is shared, or foreign."""
        module, _, part = key.removeprefix(PREFIX).rpartition(".")
        is_own = part not in self.shared and any(part in form.dims for form in self.forms)
        return (module, part) if is_own and module and key.startswith(PREFIX) else None


@dataclass(frozen=True)
class Stored:
    """How one module is stored.

    Attributes:
        form: what its tensors are.
        keys: their names in the file, by part; shared ones too.
        fit: their sizes.
    """

    form: Form
    keys: Mapping[str, str]
    fit: Fit


def modules_of(
    specs: Mapping[str, TensorSpec], vocabulary: Vocabulary, config: VariantConfig, findings: Findings
) -> dict[str, Stored]:
    """The modules in the order of ``specs``; what is missing or does not fit together becomes findings."""
    for key in vocabulary.shared.values():
        if key not in specs:
            findings.add("tensors that all modules share are missing", f"'{key}'", f"{_SAVE}.")
            return {}
    keys: dict[str, dict[str, str]] = {}
    for key in specs:
        place = vocabulary.module_and_part(key)
        if place is not None:
            keys.setdefault(place[0], dict(vocabulary.shared))[place[1]] = key
    stored = {module: _stored(module, own, specs, vocabulary, findings) for module, own in keys.items()}
    found = {module: own for module, own in stored.items() if own is not None}
    for module, own in found.items():
        _check_types(own, specs, findings)
        _check_rank(module, own, config, findings)
    return found


def extras_of(
    specs: Mapping[str, TensorSpec], vocabulary: Vocabulary, config: VariantConfig, findings: Findings
) -> dict[str, Extra]:
    """The tensors that replace a parameter of the base, by its name; those that nothing handles become findings."""
    extras: dict[str, Extra] = {}
    for key, spec in specs.items():
        if vocabulary.module_and_part(key) is not None or key in vocabulary.shared.values():
            continue
        if not _WHOLE.fullmatch(key):
            advice = f"Expected keys such as '{vocabulary.example}'. {_SAVE}."
            findings.add("tensors that nothing here handles", f"'{key}'", advice)
            continue
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if name in extras:
            twice = f"'{extras[name].key}' and '{key}'"
            findings.add("parameters that are there twice", twice, f"{_SAVE} again.")
        extras[name] = Extra(name, key, spec.dtype, spec.shape, saved_under=config.saved_under(name.rpartition(".")[0]))
    return extras


def _stored(
    module: str,
    keys: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    vocabulary: Vocabulary,
    findings: Findings,
) -> Stored | None:
    """The form in which a module is stored; None, and a finding, where it is in none."""
    form = next((form for form in vocabulary.forms if form.dims.keys() == keys.keys()), None)
    if form is None:
        names = ", ".join(sorted(keys.keys() - vocabulary.shared.keys()))
        findings.add("modules with missing tensors", f"'{module}' (only {names})", f"{_SAVE} again.")
        return None
    fit = form.fit({part: specs[key].shape for part, key in keys.items()})
    if fit is None:
        shapes = ", ".join(f"{part} {list(specs[key].shape)}" for part, key in keys.items())
        advice = f"Expected {form}: the tensors were mixed up. {_SAVE} again."
        findings.add("tensors that do not fit together", f"'{module}' ({shapes})", advice)
        return None
    return Stored(form, keys, fit)


def _check_types(stored: Stored, specs: Mapping[str, TensorSpec], findings: Findings) -> None:
    for key in stored.keys.values():
        if specs[key].dtype not in _DTYPES:
            findings.add(
                "factors of a type that is not handled",
                f"'{key}' ({str(specs[key].dtype).removeprefix('torch.')})",
                "Expected float32, float16, bfloat16 or float64: save the adapter in one of them.",
            )


def _check_rank(module: str, stored: Stored, config: VariantConfig, findings: Findings) -> None:
    claimed = config.rank_of(module)
    rank = stored.fit.sizes.get("r", claimed)
    if rank != claimed:
        findings.add(
            f"{CONFIG_NAME} contradicts the ranks of the tensors",
            f"module '{module}' (configuration {claimed}, tensors {rank})",
            "Its scaling would be wrong: correct the configuration, or take both files from the same save.",
        )
