"""LoHa: ΔW = α/r · (B1 A1) ∘ (B2 A2), of rank r²."""

from __future__ import annotations

from typing import ClassVar

from mergekit_lowrank.formats.variants.checkpoint import VariantCheckpoint
from mergekit_lowrank.formats.variants.config import LycorisConfig, VariantConfig
from mergekit_lowrank.formats.variants.forms import Form, Parts, Shape, Sizes
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.lowrank.structured import hadamard, tucker

__all__ = ["LohaCheckpoint"]


def _of_matrices(parts: Parts) -> LowRankUpdate:
    return hadamard(
        LowRankUpdate(parts["hada_w1_a"], parts["hada_w1_b"]), LowRankUpdate(parts["hada_w2_a"], parts["hada_w2_b"])
    )


def _of_kernels(parts: Parts) -> LowRankUpdate:
    return hadamard(
        tucker(parts["hada_t1"], parts["hada_w1_a"], parts["hada_w1_b"]),
        tucker(parts["hada_t2"], parts["hada_w2_a"], parts["hada_w2_b"]),
    )


def _shape(sizes: Sizes) -> Shape:
    d_out, d_in = sizes["out"], sizes["in"] * sizes["k"]
    return Shape(d_out, d_in, min(sizes["r"] ** 2, d_out, d_in))


class LohaCheckpoint(VariantCheckpoint):
    """A LoHa adapter, as peft 0.21 applies it (``tuners/loha/layer.py``)."""

    Config: ClassVar[type[VariantConfig]] = LycorisConfig
    forms: ClassVar[tuple[Form, ...]] = (
        Form(
            {"hada_w1_a": "out r", "hada_w1_b": "r in", "hada_w2_a": "out r", "hada_w2_b": "r in"},
            _shape,
            _of_matrices,
        ),
        Form(
            {
                "hada_t1": "r r *",
                "hada_w1_a": "r out",
                "hada_w1_b": "r in",
                "hada_t2": "r r *",
                "hada_w2_a": "r out",
                "hada_w2_b": "r in",
            },
            _shape,
            _of_kernels,
        ),
    )
