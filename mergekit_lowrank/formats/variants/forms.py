"""The sets of tensors in which a kind stores a module: their shapes, and the low-rank update that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mergekit_lowrank.lowrank import LowRankUpdate

__all__ = ["Fit", "Form", "Parts", "Shape", "Sizes"]

Parts = Mapping[str, Tensor]
"""The tensors of one module by the last part of their names."""

Sizes = Mapping[str, int]
"""The sizes of a form's dimensions by name; ``k`` is that of a whole kernel, 1 where there is none."""


class Shape(NamedTuple):
    """Of an update in its low-rank form."""

    d_out: int
    d_in: int
    rank: int


class Fit(NamedTuple):
    """The sizes of one module's tensors in a form, and those of the base's kernel; no sizes where there is none."""

    sizes: Sizes
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One set of tensors in which a kind stores a module.

    Attributes:
        dims: the dimensions of each tensor by name, such as ``r in``; ``*`` stands for the sizes of a kernel.
        shape: that of the update, which is known before a tensor is read.
        update: what the tensors make, as a matrix (d_out, d_in or channels · k), the configuration's scaling left out.
        at_most: dimensions that may be smaller than another one, but not larger.
        least_rank: the smallest ``r``.
    """

    dims: Mapping[str, str]
    shape: Callable[[Sizes], Shape]
    update: Callable[[Parts], LowRankUpdate]
    at_most: Mapping[str, str] = field(default_factory=dict)
    least_rank: int = 1

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> Fit | None:
        """The sizes of all dimensions; None where the shapes do not fit together."""
        sizes, kernels = {"1": 1}, dict[str, tuple[int, ...]]()
        for part, names in self.dims.items():
            axes = names.removesuffix("*").split()
            given, rest = shapes[part][: len(axes)], shapes[part][len(axes) :]
            if len(given) < len(axes) or any(
                sizes.setdefault(axis, size) != size for axis, size in zip(axes, given, strict=True)
            ):
                return None
            if names.endswith("*"):
                kernels[part] = rest
            elif rest:
                return None
        kernel = next(iter(kernels.values()), ())
        fit = Fit({**sizes, "k": math.prod(kernel)}, kernel[:1] if self._is_core_of_one(kernel) else kernel)
        return fit if set(kernels.values()) <= {kernel} and self._allows(fit.sizes) else None

    def _is_core_of_one(self, kernel: tuple[int, ...]) -> bool:
        """Whether it belongs to a core (r, r, k, 1), which peft gives to convolutions of one dimension."""
        return kernel[1:] == (1,) and "r r *" in self.dims.values()

    def _allows(self, sizes: Sizes) -> bool:
        enough = all(size >= (self.least_rank if axis == "r" else 1) for axis, size in sizes.items())
        return enough and all(sizes[small] <= sizes[large] for small, large in self.at_most.items())

    def __str__(self) -> str:
        """The shapes, as messages show them."""
        shapes = ", ".join(f"{part} [{', '.join(names.split())}]" for part, names in self.dims.items())
        return shapes + "".join(f", {small} at most {large}" for small, large in self.at_most.items())
