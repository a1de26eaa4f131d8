"""The configurations of PEFT's other kinds."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, FiniteFloat

from mergekit_lowrank.formats.adapter_config import AdapterConfig, Pattern, Rank, first_match

__all__ = ["LycorisConfig", "VariantConfig"]


class VariantConfig(AdapterConfig):
    """What the configuration of an adapter that is no LoRA says about merging."""

    ignored: ClassVar[frozenset[str]] = AdapterConfig.ignored | {"init_weights"}

    def rank_of(self, module: str) -> int:
        """The rank that the configuration claims for a module, as the kind counts it."""
        raise NotImplementedError

    def scaling_of(self, module: str) -> float:
        """What multiplies the product of a module's tensors."""
        raise NotImplementedError


class LycorisConfig(VariantConfig):
    """Of LoHa and LoKr: alpha / r, with patterns as LoRA has them; there is no rsLoRA."""

    ignored: ClassVar[frozenset[str]] = VariantConfig.ignored | {
        "rank_dropout",
        "module_dropout",
        # Whether kernels are stored as Tucker cores: the tensors themselves say so.
        "use_effective_conv2d",
    }

    r: Rank
    alpha: FiniteFloat
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, FiniteFloat] = Field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """By the first pattern that matches."""
        return first_match(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """Alpha / r, each by the first pattern that matches."""
        return first_match(self.alpha_pattern, module, self.alpha) / self.rank_of(module)
