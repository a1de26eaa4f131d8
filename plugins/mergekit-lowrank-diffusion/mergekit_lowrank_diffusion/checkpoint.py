"""A file of a diffusion LoRA, opened: which module each of its tensors belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mergekit_lowrank import Checkpoint, CheckpointError, LowRankUpdate, ModuleHeader
from mergekit_lowrank.formats import Findings, TensorSource, TensorSpec
from mergekit_lowrank_diffusion.forms import Form, form_of, layout_of
from mergekit_lowrank_diffusion.names import Rule
from mergekit_lowrank_diffusion.origin import Origin

__all__ = ["Assembly", "DiffusionCheckpoint", "Stored"]

FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Stored:
    """The tensors that hold the update of one module, or of a part of a fused one.

    Attributes:
        form: what they make up.
        keys: their names in the file, by what they are to the form.
        header: of the module.
        rows: the rows of b that are the module's.
        columns: the columns of b, and rows of a, that are.
    """

    form: Form
    keys: Mapping[str, str]
    header: ModuleHeader
    rows: slice
    columns: slice


class DiffusionCheckpoint(Checkpoint):
    """A LoRA of a diffusion model in one safetensors file.

    Args:
        source: its tensors.
        stored: what each module's update is made of, by its name.
        label: what messages call it.
        location: the path as given.
        config: what its header says.
        base_model: the base, as the header names it.
        revision: of the base.
    """

    def __init__(
        self,
        source: TensorSource,
        stored: Mapping[str, Stored],
        *,
        label: str,
        location: str,
        config: Mapping[str, object],
        base_model: str | None,
        revision: str | None = None,
    ) -> None:
        self.label = label
        self.location = location
        self.files = source.files
        self.config = config
        self.base_model = base_model
        self.revision = revision
        self.modules = {name: own.header for name, own in stored.items()}
        self._source = source
        self._stored = stored

    def read(self, module: str) -> LowRankUpdate:
        """The update of one module: stored factors as they are; products computed in float32 at least."""
        own = self._stored[module]
        tensors = {name: self._read_finite(module, key) for name, key in own.keys.items()}
        update = own.form.computed(tensors)
        b, a = update.b[own.rows, own.columns], update.a[own.columns]
        return LowRankUpdate(b, a, own.header.scaling)

    def _read_finite(self, module: str, key: str) -> Tensor:
        tensor = self._source.read(key)
        low, high = torch.aminmax(tensor)  # NaN propagates; no mask as large as the tensor
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(
                f"adapter '{self.label}': tensor '{key}' of module '{module}' holds NaN or infinite values. A merge "
                "would spread them: train or save the adapter again."
            )
        return tensor


class Assembly:
    """The modules of a file that is being opened, and what is wrong with it.

    Args:
        source: the file.
        origin: what its header says of an adapter that it was converted from.
        findings: of the file.

    Attributes:
        stored: what each module's update is made of, by its name.
    """

    def __init__(self, source: TensorSource, origin: Origin, findings: Findings) -> None:
        self.stored: dict[str, Stored] = {}
        self._source = source
        self._origin = origin
        self._findings = findings

    def add(self, rule: Rule, keys: Mapping[str, str], scaling: float) -> None:
        """Take in the tensors under one name; what is wrong with them becomes a finding.

        Args:
            rule: the name, and the modules that its tensors hold.
            keys: the tensors' names by what they are to a form.
            scaling: of all these modules.
        """
        specs = {name: self._source.specs[key] for name, key in keys.items()}
        if not self._have_types(rule.stored, specs):
            return
        form = form_of(frozenset(specs))
        update = _headers(form, specs)
        if form is None or update is None or any(0 in spec.shape for spec in specs.values()):
            shapes = ", ".join(f"{name} {list(spec.shape)}" for name, spec in specs.items())
            self._findings.add(
                "tensors that do not fit together",
                f"'{rule.stored}' ({shapes})",
                "Expected lora_down [r, in] and lora_up [out, r], or the factors of a LoCon, LoHa or LoKr: "
                "the file is incomplete, or was mixed up.",
            )
            return
        for module, rows, columns in self._parts(rule, update):
            header = ModuleHeader(
                name=module,
                d_out=rows.stop - rows.start,
                d_in=update.shape[1],
                rank=columns.stop - columns.start,
                scaling=self._origin.scalings.get(module, scaling),
                dtype=torch.promote_types(update.b.dtype, update.a.dtype),
                stored_bytes=_bytes_of(update, specs),
                layout=layout_of(specs, module, update.shape[1]),
            )
            self._put(Stored(form, keys, header, rows, columns))

    def _put(self, own: Stored) -> None:
        if own.header.name in self.stored:
            self._findings.add(
                "modules that are there twice, under two names",
                f"'{own.header.name}'",
                "Two files were put together: merge them instead.",
            )
        self.stored[own.header.name] = own

    def _have_types(self, name: str, specs: Mapping[str, TensorSpec]) -> bool:
        others = {key: spec.dtype for key, spec in specs.items() if spec.dtype not in FACTOR_DTYPES}
        for key, dtype in others.items():
            self._findings.add(
                "factors of a type that is not handled",
                f"'{name}' ({key} {str(dtype).removeprefix('torch.')})",
                "Expected float32, float16, bfloat16 or float64: save the adapter in one of them.",
            )
        return not others

    def _parts(self, rule: Rule, update: LowRankUpdate) -> list[tuple[str, slice, slice]]:
        """(module, its rows of b, its columns of b) for each module that is there."""
        unit, rest = divmod(update.shape[0], sum(rule.shares))
        ranks = self._origin.ranks.get(rule.stored)
        if rest or (ranks is not None and (len(ranks) != len(rule.modules) or sum(ranks) != update.rank)):
            self._findings.add(
                "fused layers that cannot be divided",
                f"'{rule.stored}' ({update.shape[0]} rows, rank {update.rank}, of {', '.join(rule.modules)})",
                "Its size is not that of the model which its name belongs to.",
            )
            return []
        ends = list(accumulate((share * unit for share in rule.shares), initial=0))
        rows = [slice(*pair) for pair in pairwise(ends)]
        if ranks is None:
            columns = [slice(0, update.rank)] * len(rows)
        else:
            bounds = list(accumulate(ranks, initial=0))
            columns = [slice(*pair) for pair in pairwise(bounds)]
        parts = zip(rule.modules, rows, columns, strict=True)
        return [part for part in parts if part[2].stop > part[2].start]


def _headers(form: Form | None, specs: Mapping[str, TensorSpec]) -> LowRankUpdate | None:
    """The update on the device ``meta``; None where the shapes do not fit together."""
    # The second factor of a pair and the cores have dimensions of a kernel, the first is a matrix.
    is_flat = all(len(spec.shape) == 2 for name, spec in specs.items() if name.endswith("_a"))
    if form is None or not is_flat or any(len(spec.shape) < 2 for spec in specs.values()):
        return None
    try:
        update = form.headers(specs)
    except RuntimeError:
        return None
    return update if update.b.shape[1] == update.a.shape[0] else None


def _bytes_of(update: LowRankUpdate, specs: Mapping[str, TensorSpec]) -> int:
    """Of what is read and what is made of it, whichever is more."""
    return max(sum(spec.stored_bytes for spec in specs.values()), update.b.nbytes + update.a.nbytes)
