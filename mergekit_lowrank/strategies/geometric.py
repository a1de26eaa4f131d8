"""Interpolation along the sphere and means of directions: SLERP, NuSLERP, Multi-SLERP, Karcher mean, Model Stock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank.errors import StrategyError
from mergekit_lowrank.strategies.base import MergeContext
from mergekit_lowrank.strategies.gram import GramParams, GramStrategy, lengths_and_cosines, over
from mergekit_lowrank.strategies.sums import NEGLIGIBLE_TOTAL

__all__ = ["Karcher", "ModelStock", "MultiSlerp", "NuSlerp", "Slerp"]

COLINEAR = math.sqrt(1 - 1e-3**2)
"""|cos θ| above which ``nuslerp`` interpolates linearly: |sin θ| < 1e-3. Parallel inputs then give what the arc gives,
to float32 rounding (θ²/8); for opposed ones 1/sin θ would multiply that rounding by more than a thousand."""
CANCELLED = 1e-5
"""A weighted mean of unit vectors shorter than this is rounding of float32 factors: the inputs have no common direction
(mergekit's ``tol`` of karcher)."""


def on_arc(gram: Tensor, t: float, linear_above: float) -> Tensor:
    """(…, 2): sin((1−t)θ)/sin θ and sin(tθ)/sin θ, θ the angle of two updates; 1 − t and t where that is no angle.

    That is where |cos θ| exceeds ``linear_above`` and where one of the two is zero.
    """
    lengths, cosines = lengths_and_cosines(gram)
    cosine = cosines[..., 0, 1]
    linear = (cosine.abs() > linear_above) | (lengths == 0).any(dim=-1)
    sine = torch.where(linear, 1, ((1 - cosine) * (1 + cosine)).sqrt())
    angle = torch.atan2(sine, cosine)
    arc = torch.stack([((1 - t) * angle).sin() / sine, (t * angle).sin() / sine], dim=-1)
    return torch.where(linear.unsqueeze(-1), gram.new_tensor([1 - t, t]), arc)


class SlerpParams(GramParams):
    """Parameters of ``slerp``."""

    t: float = Field(0.5, ge=0, le=1, description="where on the arc: 0 is the first model, 1 the second")
    lerp_threshold: float = Field(
        0.9995, ge=0, lt=1, description="interpolate linearly where |cos| of the angle between the two is above this"
    )


class Slerp(GramStrategy):
    """sin((1−t)θ)/sin θ · ΔW_0 + sin(tθ)/sin θ · ΔW_1, θ the angle between the two updates."""

    name = "slerp"
    summary = "between two updates along the arc, at t"
    paper = "Animating rotation with quaternion curves (Shoemake 1985)"
    Params = SlerpParams
    is_order_free = False
    min_inputs = 2
    max_inputs = 2
    params: SlerpParams

    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """Of the arc; 1 − t or t for a module that one model lacks, 1 where ``missing: present`` leaves it out."""
        if len(context.participants) > 1:
            return on_arc(gram, self.params.t, self.params.lerp_threshold)
        own = self.params.t if context.participants[0] else 1 - self.params.t
        return torch.full_like(gram[..., 0], 1 if context.weights[0] == context.total_weight else own)

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """1 − t and t; a model alone, whose position is unknown here, at its weight."""
        del total_weight
        return (1 - self.params.t, self.params.t) if len(weights) == 2 else tuple(weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse weights: ``t`` is what slerp has."""
        if total_weight != 2 or len(set(weights)) > 1:  # one of the two alone may have been raised to the total
            raise StrategyError(
                f"'slerp' takes no weights, and found {list(weights)} (1 each is the default); "
                "set parameters.t, or use merge_method: nuslerp, which interpolates by weights"
            )


class NuSlerp(GramStrategy):
    """SLERP at t = w_1 / (w_0 + w_1)."""

    name = "nuslerp"
    summary = "between two updates along the arc, by weight"
    paper = "NuSLERP (mergekit)"
    min_inputs = 2
    max_inputs = 2

    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """Of the arc; w / Σ w for a module that one model lacks."""
        shares = self.target_weights(context.weights, context.total_weight)
        return on_arc(gram, shares[1], COLINEAR) if len(shares) > 1 else torch.full_like(gram[..., 0], shares[0])

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """w_t / Σ w."""
        return tuple(w / total_weight for w in weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse to divide by a sum of weights that is zero."""
        if abs(total_weight) < NEGLIGIBLE_TOTAL:
            raise StrategyError(
                f"the weights {list(weights)} sum to {total_weight:g}, and 'nuslerp' goes the share w_1 / (w_0 + w_1) "
                "of the way; for a difference of updates use task_arithmetic"
            )


class MeanStrategy(GramStrategy):
    """A weighted mean with weights p_t = w_t / Σ w, Σ w over all inputs of the recipe."""

    def shares(self, gram: Tensor, context: MergeContext) -> Tensor:
        """(n,): the weights of the mean."""
        return gram.new_tensor(self.target_weights(context.weights, context.total_weight))

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """w_t / Σ w: the weighted average."""
        return tuple(w / total_weight for w in weights)

    def check_weights(self, weights: Sequence[float], total_weight: float) -> None:
        """Refuse negative weights, and none above zero."""
        if min(weights) < 0 or total_weight < NEGLIGIBLE_TOTAL:
            raise StrategyError(
                f"'{self.name}' is a mean of directions: its weights must be 0 or more and not all 0, and found "
                f"{list(weights)}, in sum {total_weight:g}; to subtract an update use linear or task_arithmetic"
            )

    def returns_single_input(self) -> bool:
        """Always."""
        return True


def along(direction: Tensor, lengths: Tensor, shares: Tensor) -> Tensor:
    """(…, n): coefficients of the vector of length Σ p_t ‖ΔW_t‖ along Σ_t direction_t ΔW_t/‖ΔW_t‖, a unit vector."""
    return (shares * lengths).sum(dim=-1, keepdim=True) * over(direction, lengths)


def projected(direction: Tensor, cosines: Tensor) -> Tensor:
    """(…, n): <u_s, Σ_t direction_t u_t> of unit vectors u_t with these cosines."""
    return (cosines * direction.unsqueeze(-2)).sum(dim=-1)


def length_of(direction: Tensor, cosines: Tensor) -> Tensor:
    """(…, 1): ‖Σ_t direction_t u_t‖."""
    return (projected(direction, cosines) * direction).sum(dim=-1, keepdim=True).clamp(min=0).sqrt()


class MultiSlerpParams(GramParams):
    """Parameters of ``multislerp``."""

    normalize_weights: bool = Field(
        True, description="divide the weights by their sum; false: the length of the result is Σ w·‖ΔW‖"
    )


class MultiSlerp(MeanStrategy):
    """Σ p_t ‖ΔW_t‖ along Σ p_t u_t, u_t the directions of the updates: their mean length along their mean direction.

    mergekit's step in the tangent space at that mean is Σ p_t (u_t − <u_t, m> m), which is zero by the choice of m.
    Where the directions cancel it is the weighted average.
    """

    name = "multislerp"
    summary = "the mean length along the mean direction of the updates"
    paper = "Multi-SLERP (mergekit)"
    Params = MultiSlerpParams
    params: MultiSlerpParams

    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """Of the mean direction."""
        lengths, cosines = lengths_and_cosines(gram)
        shares = self.shares(gram, context)
        size = length_of(shares, cosines)
        cancelled = size <= CANCELLED * shares.abs().sum()
        return torch.where(cancelled, shares, along(over(shares, size), lengths, shares))

    def target_weights(self, weights: Sequence[float], total_weight: float) -> tuple[float, ...]:
        """w_t, over Σ w where normalised."""
        return super().target_weights(weights, total_weight) if self.params.normalize_weights else tuple(weights)


class KarcherParams(GramParams):
    """Parameters of ``karcher``."""

    max_iter: int = Field(10, ge=0, le=1000, description="steps at most; 0 is the mean direction of `multislerp`")
    tol: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="a step shorter than this (radians) is the last; updates shorter than this share of the longest "
        "have no direction; a mean of directions shorter than this has cancelled",
    )


class Karcher(MeanStrategy):
    """Σ p_t ‖ΔW_t‖ along the point of the sphere from which the squared angles to all directions are least in sum.

    Found by steps along the mean of the logarithms, as coefficients of the directions: no step reads a tensor.
    Where the directions cancel it is the weighted average.
    """

    name = "karcher"
    summary = "the mean length along the Karcher (Riemannian) mean of the directions"
    paper = "Karcher mean (Karcher 1977); mergekit"
    Params = KarcherParams
    params: KarcherParams

    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """Of the Karcher mean."""
        lengths, cosines = lengths_and_cosines(gram)
        shares = self.shares(gram, context)
        votes = shares * (lengths > self.params.tol * lengths.amax(dim=-1, keepdim=True))
        votes = over(votes, votes.sum(dim=-1, keepdim=True))
        size = length_of(votes, cosines)
        mean = self._refined(over(votes, size), votes, cosines)
        return torch.where(size < self.params.tol, shares, along(mean, lengths, shares))

    def _refined(self, mean: Tensor, votes: Tensor, cosines: Tensor) -> Tensor:
        for _ in range(self.params.max_iter):
            step = self._step(mean, votes, cosines)
            size = length_of(step, cosines)
            moving = size >= self.params.tol
            if not bool(moving.any()):
                break
            moved = size.cos() * mean + size.sin() * over(step, size)
            mean = torch.where(moving, over(moved, length_of(moved, cosines)), mean)
        return mean

    def _step(self, mean: Tensor, votes: Tensor, cosines: Tensor) -> Tensor:
        """The weighted mean of the logarithms θ/sin θ · (u_t − cos θ · mean); none towards the antipode, or from it."""
        cosine = projected(mean, cosines).clamp(-1, 1)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        apart = sine >= self.params.tol
        pull = votes * over(torch.atan2(sine, cosine), sine * apart)
        return pull - (pull * cosine).sum(dim=-1, keepdim=True) * mean


class ModelStock(MeanStrategy):
    """t times the weighted average, t = N cos θ / (1 + (N − 1) cos θ), cos θ the mean over all pairs of updates.

    With unequal weights p the pairs count by p_s p_t and N is 1 / Σ p². t is 1 for updates of one direction, 0 for
    orthogonal ones, and negative for opposed ones.
    """

    name = "model_stock"
    summary = "the average, drawn to the base model as far as the updates disagree in direction"
    paper = "Model Stock (Jang et al. 2024, arXiv:2403.19522)"

    def coefficients(self, gram: Tensor, context: MergeContext) -> Tensor:
        """The ratio t times the weights of the mean."""
        shares = self.shares(gram, context)
        return self._ratio(gram, over(shares, shares.sum())) * shares

    def _ratio(self, gram: Tensor, shares: Tensor) -> Tensor:
        """(…, 1): t. One update that counts is its own mean: 1. Directions that cancel leave the base model: 0."""
        pairs = torch.outer(shares, shares).fill_diagonal_(0)
        if not bool(pairs.any()):
            return gram.new_ones(*gram.shape[:-2], 1)
        _, cosines = lengths_and_cosines(gram)
        cosine = ((cosines * pairs).sum(dim=(-2, -1)) / pairs.sum()).unsqueeze(-1)
        overlap = shares.square().sum()  # 1/N
        square = overlap + (1 - overlap) * cosine  # of the mean direction
        return over(cosine, torch.where(square > CANCELLED**2, square, 0))
