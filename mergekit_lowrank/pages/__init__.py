"""Pages to look at: figures as plain data, drawn as SVG, and templates around them. Nothing here knows of merges."""

from mergekit_lowrank.pages.figures import Bars, Figure, Heatmap, Lines, Series, keys_of
from mergekit_lowrank.pages.page import render
from mergekit_lowrank.pages.svg import svg
from mergekit_lowrank.pages.tables import html_table, number

__all__ = ["Bars", "Figure", "Heatmap", "Lines", "Series", "html_table", "keys_of", "number", "render", "svg"]
