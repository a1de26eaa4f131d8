"""Templates of pages: one HTML file each, with all it needs inside."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_lowrank.pages.tables import figure_table, html_table, number

__all__ = ["render"]


def render(template: str, **data: object) -> str:
    """A page from one of ``templates/``.

    All text is escaped but for ``Markup``, and a name that ``data`` lacks is an error.

    Args:
        template: its file name.
        data: what it shows.
    """
    return _environment().get_template(template).render(data)


@cache  # templates are compiled once in a process, which takes as long as to fill one
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergekit_lowrank.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    environment.globals |= {"figure_table": figure_table, "html_table": html_table, "number": number}
    return environment
