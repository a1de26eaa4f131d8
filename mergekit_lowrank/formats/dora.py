"""DoRA adapters with their base at hand: W' = m · (W + sBA) / ‖W + sBA‖, so that ΔW = W' − W is dense.

Source: Liu et al., DoRA (arXiv 2402.09353), eq. 5; the axis of the norm as in peft 0.21 (``tuners/lora/dora.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats.base import Checkpoint, Derived, ModuleHeader
from mergekit_lowrank.formats.layouts import Embedding
from mergekit_lowrank.formats.model import ModelDirectory
from mergekit_lowrank.formats.peft_keys import Findings
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, blocks_of_rows

__all__ = ["DoraCheckpoint"]

_BLOCK_ENTRIES = 1 << 20


class DoraCheckpoint(Derived):
    """A DoRA adapter against its base: modules with a magnitude are dense, all others as they were. Can be pickled.

    Args:
        adapter: whose modules are read.
        magnitudes: m by module, one number for each output of a linear layer or convolution, or each dimension of an
            embedding.
        base: what it was tuned from.
        dtype: of the rows that its dense updates give.

    Raises:
        CheckpointError: modules that the base lacks, or of another shape; all of them.
    """

    def __init__(
        self, adapter: Checkpoint, magnitudes: Mapping[str, Tensor], base: ModelDirectory, dtype: torch.dtype
    ) -> None:
        super().__init__(adapter)
        self._magnitudes, self._base, self._dtype = magnitudes, base, dtype
        self._keys = base.keys_for(magnitudes)
        _check_shapes(adapter, magnitudes, base, self._keys)
        self.modules = {
            name: _dense(header) if name in magnitudes else header for name, header in adapter.modules.items()
        }

    def read(self, module: str) -> InputUpdate:
        """The update of one module; a dense one reads the base's rows each time that it is asked for them."""
        update = self.origin.read(module)
        if module not in self._magnitudes:
            return update
        assert isinstance(update, LowRankUpdate)  # noqa: S101 - magnitudes stand beside factors
        header = self.modules[module]
        by_column = isinstance(header.layout, Embedding)
        own = self._base.module_of(self._keys[module])
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        magnitude = self._magnitudes[module].flatten().to(wide)
        rows = _Rows(self._base, own, update.to("cpu", wide), magnitude, by_column, self._dtype)
        return StreamedUpdate((header.d_out, header.d_in), self._dtype, torch.device("cpu"), rows)


@dataclass
class _Rows:
    """Rows of one module's ΔW.

    Attributes:
        base: the model.
        module: its name there.
        update: sBA.
        magnitude: m, of each row, or of each column of an embedding.
        by_column: which of the two.
        dtype: of the rows.
    """

    base: ModelDirectory
    module: str
    update: LowRankUpdate
    magnitude: Tensor
    by_column: bool
    dtype: torch.dtype

    def __call__(self, where: slice) -> Tensor:
        weights, adapted = self._both(where)
        if self.by_column:
            shrinking = self.magnitude / self._column_norms
        else:
            shrinking = (self.magnitude[where] / torch.linalg.vector_norm(adapted, dim=1)).unsqueeze(1)
        rows = adapted.mul_(shrinking).sub_(weights).to(self.dtype)
        if not math.isfinite(rows.sum()) and not bool(rows.isfinite().all()):
            raise CheckpointError(
                f"{self.base.where}: module '{self.module}': the DoRA update is not finite: a weight of the base is "
                "NaN, or a row of the adapted weights is zero. Give the base that the adapter was trained on."
            )
        return rows

    def _both(self, where: slice) -> tuple[Tensor, Tensor]:
        weights = self.base.rows(self.module, where).to(self.magnitude.dtype)
        return weights, weights + self.update.rows(where)

    @cached_property
    def _column_norms(self) -> Tensor:
        """‖·‖ of each column of the adapted weights, in one pass."""
        squares = torch.zeros(self.update.shape[1], dtype=torch.float64)
        for where in blocks_of_rows(self.update.shape, _BLOCK_ENTRIES):
            squares += self._both(where)[1].double().square_().sum(dim=0)
        return squares.sqrt().to(self.magnitude.dtype)


def _dense(header: ModuleHeader) -> ModuleHeader:
    return replace(header, is_dense=True, scaling=1.0, rank=min(header.d_out, header.d_in))


def _check_shapes(
    adapter: Checkpoint, magnitudes: Mapping[str, Tensor], base: ModelDirectory, keys: Mapping[str, str]
) -> None:
    findings = Findings(f"adapter '{adapter.label}'")
    for name, magnitude in magnitudes.items():
        own, there = adapter.modules[name], base.modules[base.module_of(keys[name])]
        if (own.d_out, own.d_in) != (there.d_out, there.d_in):
            findings.add(
                "modules of another shape than in the base",
                f"'{name}' ({own.d_out} x {own.d_in}, base {there.d_out} x {there.d_in})",
                "Give the base that it was tuned from.",
            )
        expected = own.d_in if isinstance(own.layout, Embedding) else own.d_out
        if magnitude.numel() != expected:
            findings.add(
                "magnitudes of another size than their module",
                f"'{name}' ({magnitude.numel()}, expected {expected})",
                "Save the adapter again.",
            )
    findings.raise_all()
