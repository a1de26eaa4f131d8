"""A figure of each kind, with all that can be missing in it."""

from __future__ import annotations

from mergekit_lowrank.pages import Bars, Heatmap, Lines, Series

NAMES = ("math", 'co"de<', "µ")

MAP = Heatmap(
    "map",
    "Norm ‖ΔW‖",
    "By <layer>.",
    ("q_proj", "v_proj"),
    ("0", "1", "none"),
    ((1.0, None, 3.0), (2.0, 2.5, None)),
    "%",
)
PAIRS = Heatmap(
    "pairs",
    "Cosines",
    "Of pairs.",
    NAMES,
    NAMES,
    ((1.0, 0.25, None), (0.25, 1.0, -0.5), (None, -0.5, 1.0)),
    limits=(-1.0, 1.0),
    centre=0.0,
    is_printed=True,
)
LINES = Lines(
    "lines",
    "Spectra",
    "Singular values.",
    "direction",
    "σ",
    (*(Series(name, (4.0, 1.0, 0.0)) for name in NAMES), Series("merged", (5.0,), is_emphasised=True)),
    is_logarithmic=True,
)
BARS = Bars("bars", "Share", "Of each.", NAMES, (10.0, None, 30.0), "%", ((8.0, 12.0), (0.0, 0.0), (29.0, 31.0)))
EMPTY = Heatmap("empty", "Nothing", "At all.", ("q_proj",), ("0",), ((None,),))

FIGURES = (MAP, PAIRS, LINES, BARS, EMPTY)
