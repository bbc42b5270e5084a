"""Tables that scroll inside their own box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, tag

__all__ = ["box", "table"]


def box(label: str, *children: Child, tall: bool = False) -> Element:
    """What is wider than a small screen: it scrolls by itself, by keyboard too; a ``tall`` one also up and down."""
    kind = "scroll tall" if tall else "scroll"
    return tag("div", children, class_=kind, role="region", tabindex="0", aria_label=label)


def table(
    caption: str, headers: Sequence[str], rows: Iterable[Sequence[Child]], *, left: Sequence[int] = (0,), tall: bool = False
) -> Element:
    """A table with a caption; the first cell of a row heads it. Columns in ``left`` hold words, the others numbers."""

    def cell(kind: str, place: int, content: Child, scope: str | None = None) -> Element:
        return tag(kind, content, class_=None if place in left else "number", scope=scope)

    head = tag("tr", [cell("th", place, text, "col") for place, text in enumerate(headers)])
    body = [
        tag("tr", [cell("td" if place else "th", place, c, None if place else "row") for place, c in enumerate(row)])
        for row in rows
    ]
    return box(caption, tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body)), tall=tall)
