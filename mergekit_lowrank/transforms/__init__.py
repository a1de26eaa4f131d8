"""One adapter made into another: of another dialect, of another rank, or out of a full fine-tune."""

from mergekit_lowrank.transforms.conversion import ConversionReport, convert
from mergekit_lowrank.transforms.truncation import RankLike, extract, resize

__all__ = ["ConversionReport", "RankLike", "convert", "extract", "resize"]
