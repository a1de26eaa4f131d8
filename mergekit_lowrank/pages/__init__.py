"""Pages to look at: figures as plain data, drawn as SVG, and templates around them. Nothing here knows of merges."""

from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines, Series

__all__ = ["Bars", "Figure", "Heatmap", "Lines", "Series"]
