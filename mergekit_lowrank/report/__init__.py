"""What a merge did: the report, the manifest, the model card and the closing lines."""

from mergekit_lowrank.report.card import model_card
from mergekit_lowrank.report.comparison import MergeComparison, compare_merges
from mergekit_lowrank.report.files import index_of, write_texts
from mergekit_lowrank.report.manifest import Digests, background_digests, build_manifest, sha256_of
from mergekit_lowrank.report.results import Report, build_report
from mergekit_lowrank.report.summary import closing_lines

__all__ = [
    "Digests",
    "MergeComparison",
    "Report",
    "background_digests",
    "build_manifest",
    "build_report",
    "closing_lines",
    "compare_merges",
    "index_of",
    "model_card",
    "sha256_of",
    "write_texts",
]
