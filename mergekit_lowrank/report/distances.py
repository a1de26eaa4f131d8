"""How far the stored updates of two merges are apart, a module at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mergekit_lowrank.engine import open_checkpoint
from mergekit_lowrank.formats import Checkpoint
from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, distance, inner_products
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.report.outputs import MergeOutput, counted, named

__all__ = ["Distance", "Distances"]


class Distance(NamedTuple):
    """Of two updates M_A and M_B.

    Attributes:
        relative: ‖M_A − M_B‖_F / ‖M_A‖_F; None where M_A is zero or nothing was measured.
        cosine: <M_A, M_B> / (‖M_A‖·‖M_B‖); None where one is zero or nothing was measured.
    """

    relative: float | None
    cosine: float | None


class Distances:
    """Measures modules of two outputs, where both hold adapters that can be read.

    Distances come from the factors in float64, without a dense matrix and without cancellation; of what has no factors,
    from blocks of rows.

    Args:
        one: A.
        other: B.
        registry: opens what they hold.
    """

    def __init__(self, one: MergeOutput, other: MergeOutput, registry: Registry) -> None:
        self._remarks: list[str] = []
        self._pair = self._opened((one, other), registry)
        self._reshaped: list[str] = []
        self._products = torch.zeros(2, 2, dtype=torch.float64)
        self._missed = 0.0

    @property
    def total(self) -> Distance:
        """Over all modules that were measured so far, as if they were one matrix."""
        return _distance(self._products, self._missed)

    @property
    def remarks(self) -> list[str]:
        """What was not measured so far, and why."""
        if not self._reshaped:
            return self._remarks
        where = f"{counted(self._reshaped)} of another shape in B, so not of one base: {named(self._reshaped)}."
        return [*self._remarks, where]

    def of(self, module: str) -> Distance:
        """That of one module; of one that either lacks, nothing."""
        if self._pair is None or not all(module in own.modules for own in self._pair):
            return Distance(None, None)
        x, y = (own.read(module).to("cpu", torch.float64) for own in self._pair)
        if x.shape != y.shape:
            self._reshaped.append(module)
            return Distance(None, None)
        products = inner_products([x, y])
        missed = 0.0 if _are_equal(x, y) else distance(x, [y], [1.0]) ** 2
        self._products += products
        self._missed += missed
        return _distance(products, missed)

    def _opened(self, outputs: Sequence[MergeOutput], registry: Registry) -> list[Checkpoint] | None:
        """Both adapters; None where one is not an adapter, or nothing reads it."""
        unread = [self._why_not(own, registry) for own in outputs]
        if any(unread):
            self._remarks += [f"{why}, so there are no distances." for why in unread if why]
            return None
        opened = [open_checkpoint(own.directory, registry, label=own.name) for own in outputs]
        for own, checkpoint in zip(outputs, opened, strict=True):
            if checkpoint.extras:
                beside = named([*checkpoint.extras])
                self._remarks.append(f"{own.name} holds {beside} beside its updates; such tensors are not compared.")
        return opened

    def _why_not(self, own: MergeOutput, registry: Registry) -> str | None:
        if own.report.kind != "adapter":
            return f"{own.name} is a whole model, whose update is not stored"
        if any(cls().recognises(own.directory) for cls in registry.formats.values()):
            return None
        return f"Nothing that is installed reads {own.name} ({own.report.format})"


def _are_equal(x: InputUpdate, y: InputUpdate) -> bool:
    """Whether both have the same factors: their distance is not left to rounding then."""
    if not (isinstance(x, LowRankUpdate) and isinstance(y, LowRankUpdate)):
        return False
    return x.scaling == y.scaling and torch.equal(x.b, y.b) and torch.equal(x.a, y.a)


def _distance(products: torch.Tensor, missed: float) -> Distance:
    """From the inner products (2, 2) and the squared distance."""
    own, its = products.diagonal().clamp(min=0).sqrt().tolist()
    cosine = max(-1.0, min(1.0, float(products[0, 1]) / (own * its))) if own and its else None
    return Distance(math.sqrt(missed) / own if own else None, cosine)
