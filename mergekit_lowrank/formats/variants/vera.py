"""VeRA: ΔW = diag(λ_b) B diag(λ_d) A, of rank r, with one random A and B that all modules share and cut to size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import field_validator

from mergekit_lowrank.formats.adapter_config import Rank
from mergekit_lowrank.formats.variants.checkpoint import VariantCheckpoint
from mergekit_lowrank.formats.variants.config import VariantConfig
from mergekit_lowrank.formats.variants.forms import Fit, Form, Parts, Shape, Sizes
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.lowrank.structured import with_diagonals

__all__ = ["VeraCheckpoint"]

_NEEDS_BASE = (
    "it is a VeRA adapter, which does not say how wide each of its modules is. The shapes of the base's weights do"
)


def _shape(sizes: Sizes) -> Shape:
    return Shape(sizes["out"], sizes["widest"], sizes["r"])


def _update(parts: Parts) -> LowRankUpdate:
    """At the full width of A: λ_b says how many rows of B there are, nothing stored how many columns of A."""
    rows = parts["vera_lambda_b"]
    return with_diagonals(LowRankUpdate(parts["vera_B"][: len(rows)], parts["vera_A"]), parts["vera_lambda_d"], rows)


class VeraConfig(VariantConfig):
    """Of VeRA: there is one rank, and no scaling."""

    ignored: ClassVar[frozenset[str]] = VariantConfig.ignored | {
        "vera_dropout",
        "d_initial",
        # What A and B were drawn from: they are stored.
        "projection_prng_key",
    }

    r: Rank
    save_projection: bool = True
    bias: Literal["none", "all", "vera_only"] = "none"

    @field_validator("save_projection")
    @classmethod
    def _is_saved(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "A and B are not stored, and what a seed gives depends on the machine and on PyTorch's version. Where "
                "the adapter was trained, save it as a LoRA: peft.save_as_lora(path, model, rank=r)"
            )
        return value

    def rank_of(self, module: str) -> int:
        """The one rank."""
        return self.r

    def scaling_of(self, module: str) -> float:
        """One: λ_b and λ_d are all there is."""
        return 1.0


class VeraCheckpoint(VariantCheckpoint):
    """A VeRA adapter, as peft 0.21 applies it (``tuners/vera/layer.py``).

    A is as wide as the widest module. How wide each other module is only the base can say.
    """

    Config: ClassVar[type[VariantConfig]] = VeraConfig
    forms: ClassVar[tuple[Form, ...]] = (
        Form(
            {"vera_lambda_b": "out", "vera_lambda_d": "r", "vera_A": "r widest", "vera_B": "tallest r"},
            _shape,
            _update,
            at_most={"out": "tallest"},
        ),
    )
    shared: ClassVar[Mapping[str, str]] = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}

    def _why_base_is_needed(self) -> str | None:
        return _NEEDS_BASE if len(self.modules) > 1 and not self._weights else None

    def _shape(self, module: str, fit: Fit) -> Shape:
        shape = super()._shape(module, fit)
        return shape._replace(d_in=min(shape.d_in, self._weights.get(module, (0, shape.d_in))[1]))

    def _update(self, module: str) -> LowRankUpdate:
        update = super()._update(module)
        return replace(update, a=update.a[:, : self.modules[module].d_in])
