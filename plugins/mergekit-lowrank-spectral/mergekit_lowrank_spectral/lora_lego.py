"""LoRA-LEGO: the rank-one parts of all adapters, clustered; one part of the result is the mean of a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank import (
    Coordinates,
    LowRankUpdate,
    MergeContext,
    ModuleShape,
    Params,
    Space,
    Strategy,
    StrategyError,
    Update,
)
from mergekit_lowrank.lowrank import in_double
from mergekit_lowrank.spaces import FactorCoordinates
from mergekit_lowrank_spectral.clustering import mean_weights

__all__ = ["LoraLego"]


class LoraLegoParams(Params):
    """Parameters of ``lora_lego``."""

    clusters: int | None = Field(
        None, ge=1, description="rank of the result (k of the paper); left out: the largest rank of the inputs"
    )
    parameter_reweighting: Literal["max", "euclidean", "none"] = Field(
        "max",
        description="the norm of a cluster's mean that is raised to the average norm of its members: the largest "
        "magnitude, the Euclidean norm, or none",
    )
    output_reweighting: bool = Field(
        True, description="multiply the result by √(r/k), r the mean rank of the inputs and k that of the result"
    )
    iterations: int = Field(300, ge=1, description="rounds of k-means at most")


@dataclass(frozen=True, eq=False)
class Units:
    """Minimal semantic units: row i of A beside column i of B.

    Attributes:
        a: (n, d_in).
        b: (n, d_out).
    """

    a: Tensor
    b: Tensor

    def gram(self) -> Tensor:
        """(n, n) inner products, in float64."""
        a, b = in_double(self.a), in_double(self.b)
        return a @ a.T + b @ b.T

    def means(self, weights: Tensor) -> Units:
        """The weighted sums P · units, (k, …), of P (k, n)."""
        return Units(weights @ self.a, weights @ self.b)

    def norms(self, kind: Literal["max", "euclidean"]) -> Tensor:
        """(n,): of each unit as one vector."""
        order = math.inf if kind == "max" else 2.0
        halves = [torch.linalg.vector_norm(half, ord=order, dim=1) for half in (self.a, self.b)]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(halves), ord=order, dim=0)
        return norms


class LoraLego(Strategy):
    """k-means over the units [A_i; B_i] of all adapters: mean by mean, raised to the norm of its members.

    Weight and scaling enter as √|w s| on both halves, the sign on A, as the space has it. Units that add nothing to
    their update (a zero row of A or column of B, such as padding) are left out.
    """

    name = "lora_lego"
    summary = "clusters the rank-one parts of all adapters and keeps one mean for each cluster (LoRA-LEGO)"
    paper = "LoRA-LEGO (arXiv:2409.16167)"
    Params = LoraLegoParams
    spaces = ("factors",)
    params: LoraLegoParams

    def merge(self, coordinates: Coordinates, context: MergeContext) -> Update:
        """The centroids as an adapter of rank k."""
        if not isinstance(coordinates, FactorCoordinates):
            raise StrategyError(f"'lora_lego' works in space 'factors', not in {type(coordinates).__name__}")
        inputs = [units for units in units_of(coordinates) if units.a.shape[0]]
        if not inputs:
            first = coordinates.updates[0]
            return LowRankUpdate(first.b[:, :0], first.a[:0])
        ranks = [units.a.shape[0] for units in inputs]
        units = Units(torch.cat([u.a for u in inputs]), torch.cat([u.b for u in inputs]))
        merged = self.centroids(units, self.params.clusters or max(ranks))
        rank = merged.a.shape[0]
        scaling = math.sqrt(sum(ranks) / len(ranks) / rank) if self.params.output_reweighting else 1.0
        return LowRankUpdate(merged.b.T, merged.a, scaling)

    def centroids(self, units: Units, clusters: int) -> Units:
        """The reweighted means of the clusters."""
        weights = mean_weights(units.gram(), clusters, self.params.iterations).to(units.a)
        means = units.means(weights)
        kind = self.params.parameter_reweighting
        if kind == "none":
            return means
        wanted, found = weights @ units.norms(kind), means.norms(kind)
        # Units that cancel to rounding have a mean without a direction.
        real = found > torch.finfo(found.dtype).eps * wanted
        factors = torch.where(real, wanted / torch.where(real, found, 1), 0).unsqueeze(1)
        return Units(means.a * factors, means.b * factors)

    def returns_single_input(self) -> bool:
        """Where the rank is the input's own: every unit is then a cluster."""
        return self.params.clusters is None

    def working_entries(self, shape: ModuleShape, space: Space) -> int:
        """The stacks of the space, the units, one half of them in float64, the means, and n × n tables."""
        return space.working_entries(shape) + 6 * shape.factor_entries + 16 * shape.joint_rank**2


def units_of(coordinates: FactorCoordinates) -> list[Units]:
    """The units of each input that add something to its update."""
    a, b = coordinates.parts
    units = []
    for update, on_a, on_b in zip(coordinates.updates, a.weights, b.weights, strict=True):
        kept = (update.a * on_a).any(dim=1) & (update.b * on_b).any(dim=0)
        units.append(Units(update.a[kept] * on_a, update.b.T[kept] * on_b))
    return units
