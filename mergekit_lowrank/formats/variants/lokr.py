"""LoKr: ΔW = α/r · W1 ⊗ W2, where W1 and W2 are whole or low-rank, and W2 of a convolution may be a Tucker kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import ClassVar

from torch import Tensor

from mergekit_lowrank.formats.variants.checkpoint import VariantCheckpoint
from mergekit_lowrank.formats.variants.config import LycorisConfig, VariantConfig
from mergekit_lowrank.formats.variants.forms import Form, Parts, Shape, Sizes
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.lowrank.structured import kronecker, tucker

__all__ = ["LokrCheckpoint"]

_LEFT = ({"lokr_w1": "out1 in1"}, {"lokr_w1_a": "out1 r", "lokr_w1_b": "r in1"})
_RIGHT = (
    {"lokr_w2": "out2 in2 *"},
    {"lokr_w2_a": "out2 r", "lokr_w2_b": "r in2"},
    {"lokr_t2": "r r *", "lokr_w2_a": "r out2", "lokr_w2_b": "r in2"},
)


def _shape(sizes: Sizes, *, is_left_whole: bool, is_right_whole: bool) -> Shape:
    left = sizes["out1"], sizes["in1"]
    right = sizes["out2"], sizes["in2"] * sizes["k"]
    left_rank = min(left) if is_left_whole else min(*left, sizes["r"])
    right_rank = min(right) if is_right_whole else min(*right, sizes["r"])
    return Shape(left[0] * right[0], left[1] * right[1], left_rank * right_rank)


def _update(parts: Parts) -> LowRankUpdate:
    left, right = _left(parts), _right(parts)
    if isinstance(right, Tensor) and right.ndim == 3:
        return _of_one_dimension(left, right)
    return kronecker(left, right.flatten(1) if isinstance(right, Tensor) else right)


def _left(parts: Parts) -> LowRankUpdate | Tensor:
    if "lokr_w1" in parts:
        return parts["lokr_w1"]
    return LowRankUpdate(parts["lokr_w1_a"], parts["lokr_w1_b"])


def _right(parts: Parts) -> LowRankUpdate | Tensor:
    if "lokr_w2" in parts:
        return parts["lokr_w2"]
    if "lokr_t2" in parts:
        return tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return LowRankUpdate(parts["lokr_w2_a"], parts["lokr_w2_b"])


def _of_one_dimension(left: LowRankUpdate | Tensor, right: Tensor) -> LowRankUpdate:
    """The product with a whole W2 (out2, in2, k) as peft trains and applies it, which differs from that of kernels.

    peft gives W1 the dimensions (1, out1, in1), multiplies, and lays the numbers out anew: rows are then (out2, out1)
    and columns (in2, in1, k) in place of (out1, out2) and (in1, in2, k).
    """
    swapped = kronecker(right.flatten(1), left)  # columns (in2, k, in1)
    _, in2, size = right.shape
    columns = swapped.a.reshape(swapped.rank, in2, size, -1)
    return replace(swapped, a=columns.transpose(2, 3).flatten(1))


class LokrConfig(LycorisConfig):
    """Of LoKr: which of the matrices are factored, and how large they are, the tensors themselves say."""

    ignored: ClassVar[frozenset[str]] = LycorisConfig.ignored | {
        "decompose_both",
        "decompose_factor",
        "rank_dropout_scale",
    }


class LokrCheckpoint(VariantCheckpoint):
    """A LoKr adapter, as peft 0.21 applies it (``tuners/lokr/layer.py``)."""

    Config: ClassVar[type[VariantConfig]] = LokrConfig
    forms: ClassVar[tuple[Form, ...]] = tuple(
        Form(
            {**left, **right},
            partial(_shape, is_left_whole="lokr_w1" in left, is_right_whole="lokr_w2" in right),
            _update,
        )
        for left, right in product(_LEFT, _RIGHT)
    )
