"""Dense costs measured on some shapes and carried over to others by their operation counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.benchmarks.measuring import Figures
from tests.benchmarks.shapes import Shape


def thin_svd_flops(shape: Shape) -> float:
    """Of U₁, Σ and V of a dense matrix: 6mn² + 20n³, m ≥ n (Golub and Van Loan, Matrix Computations, section 8.6)."""
    m, n = max(shape), min(shape)
    return 6 * m * n**2 + 20 * n**3


def full_svd_flops(shape: Shape) -> float:
    """With the square U that ``full_matrices=True`` asks for: 4m²n + 22n³ (same source)."""
    m, n = max(shape), min(shape)
    return 4 * m**2 * n + 22 * n**3


@dataclass
class Costs:
    """What a dense path takes, by shape.

    Attributes:
        flops: of a shape, as far as it decides the time.
        measured: figures of the shapes that were run.
    """

    flops: Callable[[Shape], float]
    measured: dict[Shape, Figures] = field(default_factory=dict)

    def of(self, shape: Shape, key: str = "wall_seconds") -> float:
        """As measured, else from the shape nearest in work; a wide one costs what its transpose does."""
        distance = {known: abs(self.flops(known) - self.flops(shape)) for known in self.measured}
        nearest = shape if shape in self.measured else min(distance, key=distance.__getitem__)
        seconds: float = self.measured[nearest][key]
        return seconds * self.flops(shape) / self.flops(nearest)

    def total(self, shapes: Mapping[Shape, int], key: str = "wall_seconds") -> float:
        """Over so many modules of each shape."""
        return sum(count * self.of(shape, key) for shape, count in shapes.items())
