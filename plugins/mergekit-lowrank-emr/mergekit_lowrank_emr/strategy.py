"""EMR: elect a sign for each entry, keep the largest entry that has it, and remember which inputs agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank import Coordinates, ElementwiseStrategy, LowRankUpdate, MergeContext, Params, Part
from mergekit_lowrank.strategies import column
from mergekit_lowrank.strategies.stages import disjoint_max, elect_sign, keep_agreeing

__all__ = ["Emr", "packed", "unpacked"]


class EmrParams(Params):
    """Parameters of ``emr``."""

    zero_sign: Literal["negative", "none"] = Field(
        "negative",
        description="sign where the inputs cancel exactly: negative, as in the authors' code, or none, as in the "
        "paper: the entry is 0 then",
    )


class Emr(ElementwiseStrategy):
    """The unified factors, and for every input the mask of entries whose sign it shares.

    γ = sgn Σ_t y_t; y_uni = γ · max |y_t| over the inputs with sgn y_t = γ; M_t = [y_t · y_uni > 0], with y_t the
    scaled entries of A and of B. What ``restore`` needs beside the masks, Σ |y_t|, is stored for each factor.

    Source: EMR-Merging (Huang et al. 2024, arXiv:2405.17461), section 3.2.
    """

    name = "emr"
    summary = "one unified adapter, and a mask for each input that gives its adapter back nearly as it was"
    paper = "EMR-Merging (Huang et al. 2024, arXiv:2405.17461)"
    Params = EmrParams
    spaces = ("factors",)
    keeps_factors = True
    takes_dense = False  # nor would its masks be smaller than a fine-tune
    params: EmrParams

    @classmethod
    def supports(cls, space: str) -> bool:
        """``factors`` only: elsewhere the masks would be as large as the deltas."""
        return space in cls.spaces

    def merge_block(self, block: Tensor, weights: Tensor, context: MergeContext) -> Tensor:
        """The entry of largest magnitude among those of the elected sign."""
        weighted = block * weights
        sign = elect_sign(weighted)
        if self.params.zero_sign == "negative":
            sign = sign - (sign == 0).to(sign)
        return disjoint_max(keep_agreeing(weighted, sign))

    def artefacts(
        self, coordinates: Coordinates, written: LowRankUpdate, scale: float, context: MergeContext
    ) -> Mapping[str, Tensor]:
        """For each factor the packed masks, (n, rows, ⌈columns/8⌉) bytes, and Σ |y_t|, (n,); the n inputs' indices.

        And the scale of the module, which restoring takes out of B again.
        """
        found = {
            "participants": torch.tensor(context.participants, dtype=torch.int64),
            "scale": torch.tensor(scale, dtype=torch.float64),
        }
        for part, unified in zip(coordinates.parts, (written.a, written.b * scale), strict=True):
            inputs = torch.cat(list(_weighted(part)), dim=1 + part.axis)
            found[f"{part.name}.masks"] = packed(inputs * unified > 0)
            found[f"{part.name}.sums"] = inputs.double().abs().sum(dim=(1, 2))
        return found

    def returns_single_input(self) -> bool:
        """Always."""
        return True


def _weighted(part: Part) -> Iterator[Tensor]:
    weights = column(part.weights, part)
    return (block * weights for block in part.blocks())


def packed(masks: Tensor) -> Tensor:
    """Booleans (…, columns) as bits (…, ⌈columns/8⌉), the first entry in the highest bit of the first byte."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1))


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """The booleans that ``packed`` was given."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=columns)).bool()
