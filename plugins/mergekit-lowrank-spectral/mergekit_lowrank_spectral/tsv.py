"""TSV-M: the leading singular triplets of every update, orthogonalised against each other."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mergekit_lowrank import MergeContext
from mergekit_lowrank.lowrank import norm
from mergekit_lowrank_spectral.cores import Cores, CoreStrategy, OrthogonalisingParams, leading, orthogonalised

__all__ = ["Tsv"]


class TsvParams(OrthogonalisingParams):
    """Parameters of ``tsv``."""

    rank_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the joint directions that each input keeps, at least one; left out: one N-th, as the "
        "paper has it, which is all of N adapters of one rank; 1 keeps everything (the code's lossless variant)",
    )


class Tsv(CoreStrategy):
    """U* · diag(s) · V*, of the k leading triplets of each w_t ΔW_t: s their values, U* and V* the polar factors."""

    name = "tsv"
    summary = "leading singular vectors of all inputs, orthogonalised against each other (TSV-M)"
    paper = "Task Singular Vectors (arXiv:2412.00081)"
    Params = TsvParams
    params: TsvParams

    def merged_core(self, cores: Cores, context: MergeContext) -> Tensor:
        """The sum of all triplets with orthogonalised vectors."""
        share, tolerance = self.params.rank_share or 1 / len(cores.updates), self.params.rank_tolerance
        # As the code has it: a float product, then truncation.
        kept = max(1, int(cores.directions * share))
        triplets = [leading(core, kept, tolerance * norm(core)) for core in cores.weighted(context.weights)]
        left, right = orthogonalised(triplets, tolerance)
        return left * torch.cat([t.values for t in triplets]) @ right

    def returns_single_input(self) -> bool:
        """Where one input keeps all its directions."""
        return self.params.rank_share in (None, 1.0)
