"""What adapters of PEFT's other kinds have in common: headers from shapes, updates as low-rank factors on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.base import Checkpoint, Extra, ModuleHeader
from mergekit_lowrank.formats.checked import finite
from mergekit_lowrank.formats.layouts import LINEAR, Convolution, Layout
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.peft_config import CONFIG_NAME
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.formats.tensors import TensorSource
from mergekit_lowrank.formats.variants.config import VariantConfig
from mergekit_lowrank.formats.variants.contents import Stored, Vocabulary, extras_of, modules_of
from mergekit_lowrank.formats.variants.forms import Fit, Form, Shape
from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["VariantCheckpoint"]

_Own = TypeVar("_Own", bound="VariantCheckpoint")


class VariantCheckpoint(Checkpoint):
    """An adapter of one of PEFT's other kinds, as a LoRA that computes the same.

    Factors are float32, or float64 where any tensor of the module is: products of stored numbers would be rounded in
    less. So a kind that only copies and multiplies 16-bit numbers is exact.

    Args:
        source: its tensors.
        config: its configuration.
        label: what messages call it.
        location: the path as given.
        files: every file it consists of; empty in memory.
        weights: the shapes (out, in, *kernel) of the base's weights by module, where they are known.

    Raises:
        CheckpointError: tensors that nothing handles, or that contradict each other, the configuration or the base.
    """

    Config: ClassVar[type[VariantConfig]]
    forms: ClassVar[tuple[Form, ...]]
    shared: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        source: TensorSource,
        config: VariantConfig,
        *,
        label: str,
        location: str,
        files: tuple[Path, ...] = (),
        weights: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.label = label
        self.location = location
        self.files = files
        self.base_model = config.base_model_name_or_path
        self.revision = config.revision
        self.task_type = config.task_type
        self.fan_in_fan_out = config.fan_in_fan_out
        self.config = config.raw
        self._source, self._config, self._weights = source, config, weights or {}
        self._where = f"adapter '{label}'"
        self._stored, self.extras = self._contents()
        self.modules = self._headers()
        self.needs_base = self._why_base_is_needed()

    @classmethod
    def open(
        cls: type[_Own],
        config: Mapping[str, object],
        source: TensorSource,
        *,
        label: str,
        location: str,
        files: tuple[Path, ...] = (),
    ) -> _Own:
        """The adapter of a configuration as stored.

        Raises:
            CheckpointError: all that is wrong with the configuration, or with the tensors.
        """
        checked = cls.Config.parse(config, where=f"adapter '{label}': {CONFIG_NAME}")
        return cls(source, checked, label=label, location=location, files=files)

    @property
    def identity(self) -> object:
        """The files, or in memory the storage of the tensors."""
        return super().identity if self.files else self._source.identity

    def against(self, base: ModelDirectory, dtype: torch.dtype) -> Checkpoint:
        """The adapter with its base at hand, whose shapes say what the adapter leaves open: kernels, and VeRA's widths.

        Raises:
            CheckpointError: the base lacks modules, or has other shapes.
        """
        weights: dict[str, tuple[int, ...]] = {}
        for module, key in base.keys_for(self.modules).items():
            shape = base.source.specs[key].shape
            weights[module] = shape[::-1] if base.is_transposed(base.module_of(key)) else shape
        return type(self)(
            self._source,
            self._config,
            label=self.label,
            location=self.location,
            files=self.files,
            weights=weights,
        )

    def read(self, module: str) -> LowRankUpdate:
        """The update of one module, made of its tensors, all finite."""
        return self._update(module).scaled(self._config.scaling_of(module))

    def read_extra(self, name: str, where: slice) -> Tensor:
        """Rows of a tensor beside the factors, finite."""
        extra = self.extras[name]
        if len(extra.shape) < 2:
            return self._finite(extra.key, self._source.read(extra.key).reshape(1, -1)[where])
        return self._finite(extra.key, self._source.read_rows(extra.key, where).flatten(1))

    def _why_base_is_needed(self) -> str | None:
        """What the tensors leave open; None where they say it all."""
        return None

    def _shape(self, module: str, fit: Fit) -> Shape:
        """That of the update of one module."""
        return self._stored[module].form.shape(fit.sizes)

    def _update(self, module: str) -> LowRankUpdate:
        """The update of one module, the configuration's scaling left out."""
        own, dtype = self._stored[module], self.modules[module].dtype
        parts = {part: self._finite(key, self._source.read(key)).to(dtype) for part, key in own.keys.items()}
        return own.form.update(parts)

    def _finite(self, key: str, tensor: Tensor) -> Tensor:
        return finite(tensor, key, where=self._where)

    def _contents(self) -> tuple[dict[str, Stored], dict[str, Extra]]:
        """The modules, and what lies beside them.

        Raises:
            CheckpointError: tensors that nothing handles, are missing, or do not fit together; all of them.
        """
        findings, vocabulary = Findings(self._where), Vocabulary(self.forms, self.shared)
        modules = modules_of(self._source.specs, vocabulary, self._config, findings)
        extras = extras_of(self._source.specs, vocabulary, self._config, findings)
        findings.raise_all()
        if not modules and not extras:
            raise CheckpointError(f"{self._where}: the adapter is empty; expected keys such as '{vocabulary.example}'.")
        return modules, extras

    def _headers(self) -> dict[str, ModuleHeader]:
        """What is known of each module, once it is found to fit the base's.

        Raises:
            CheckpointError: modules of another shape than in the base.
        """
        findings = Findings(self._where)
        headers = {module: self._header(module, own) for module, own in self._stored.items()}
        for module, header in headers.items():
            weight = self._weights.get(module)
            if weight is not None and (header.d_out, header.d_in) != (weight[0], math.prod(weight[1:])):
                findings.add(
                    "modules of another shape than in the base",
                    f"'{module}' ({header.d_out} x {header.d_in}, base {list(weight)})",
                    "Give the base that it was tuned from.",
                )
        findings.raise_all()
        return headers

    def _header(self, module: str, own: Stored) -> ModuleHeader:
        specs = [self._source.specs[key] for key in own.keys.values()]
        dtype = torch.float32
        for spec in specs:
            dtype = torch.promote_types(dtype, spec.dtype)
        d_out, d_in, rank = self._shape(module, own.fit)
        return ModuleHeader(
            name=module,
            d_out=d_out,
            d_in=d_in,
            rank=rank,
            scaling=self._config.scaling_of(module),
            dtype=dtype,
            # The tensors and the factors they make are in memory together.
            stored_bytes=dtype.itemsize * (rank * (d_out + d_in) + sum(math.prod(spec.shape) for spec in specs)),
            layout=self._layout(module, d_in, own.fit.kernel),
        )

    def _layout(self, module: str, d_in: int, kernel: tuple[int, ...]) -> Layout:
        """That of a convolution where the base's weight or, without it, the adapter's tensors have a kernel."""
        sizes = self._weights[module][2:] if module in self._weights else kernel
        return Convolution(d_in // math.prod(sizes), sizes) if sizes else LINEAR
