"""k-means without random numbers, from inner products alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["mean_weights"]

COINCIDENT = 1e-12
"""Squared distances up to this share of the largest squared norm are rounding: such points need no seed of their
own."""


def mean_weights(gram: Tensor, clusters: int, iterations: int) -> Tensor:
    """P (k, n): row c holds 1/|c| for the members of cluster c, so that P · points are the means; k ≤ ``clusters``.

    Lloyd's algorithm from greedy seeds. Distances come from the Gram matrix, so points of any dimension cost n² each
    round. Nothing depends on the order of the points but exact ties, which the first wins. A cluster that loses its
    last member goes.

    Args:
        gram: (n, n) inner products of the n ≥ 1 points, float64.
        clusters: k at most.
        iterations: rounds at most; it usually ends by itself.

    Source: Lloyd 1982; seeds as in greedy k-means++ (Bhattacharya et al., arXiv:1912.00653) with every point tried.
    """
    squares = gram.diagonal()
    distances = (squares + squares.unsqueeze(1) - 2 * gram).clamp(min=0)
    labels = distances[_seeds(distances, clusters, COINCIDENT * float(squares.max()))].argmin(dim=0)
    for _ in range(iterations):
        means = _means(labels)
        products = means @ gram
        nearest = ((products * means).sum(dim=1, keepdim=True) - 2 * products).argmin(dim=0)
        if torch.equal(_means(nearest), means):
            return means
        labels = nearest
    return _means(labels)


def _seeds(distances: Tensor, count: int, coincident: float) -> list[int]:
    """Points, each the one that lowers Σ (squared distance to the nearest seed) most; the first is the medoid."""
    nearest = torch.full_like(distances[0], torch.inf)
    seeds: list[int] = []
    while len(seeds) < count and bool(nearest.max() > coincident):
        seeds.append(int(torch.minimum(distances, nearest).sum(dim=1).argmin()))
        nearest = torch.minimum(nearest, distances[seeds[-1]])
    return seeds


def _means(labels: Tensor) -> Tensor:
    members = one_hot(labels).T.double()
    members = members[members.any(dim=1)]
    return members / members.sum(dim=1, keepdim=True)
