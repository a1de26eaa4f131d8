"""What a notebook shows of a value: its facts, and what is folded below them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup, escape

from mergekit_lowrank.pages.tables import html_table

__all__ = ["cell"]


def cell(title: str, facts: Iterable[tuple[str, object]], folded: Mapping[str, Markup]) -> str:
    """HTML in the colours of the notebook, light or dark: it names none of its own. All text is escaped.

    Args:
        title: above the facts.
        facts: names and values; names that repeat the one before stand once.
        folded: tables by the titles under which they unfold.
    """
    rows: list[tuple[str, object]] = []
    before = ""
    for name, value in facts:
        rows.append(("" if name == before else name, value))
        before = name
    details = "".join(
        f"<details><summary>{escape(name)}</summary>\n{table}\n</details>\n" for name, table in folded.items()
    )
    return f"<div>\n{html_table(('', ''), rows, caption=title)}\n{details}</div>"
